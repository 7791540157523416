"""The recipe of the bundled pair: one command from the interpreter's sources to served models.

    python examples/training/bundled_pair/build.py            # about three hours on two quiet cores

Stages: corpus, target, unloop, distill, head, evaluate, install. Every stage shows a progress bar,
is seeded, and continues where it stopped when the command is given again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
TARGET_NAME, HEAD_NAME = "python-target", "python-specformer"


def run(script: str, *arguments: object, processes: int = 1) -> None:
    """Run a script of this folder; single-threaded data-parallel processes beat threads here."""
    launcher = [sys.executable]
    environment = dict(os.environ)
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        environment["OMP_NUM_THREADS"] = "1"
    command = [*launcher, str(HERE / script), *map(str, arguments)]
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, env=environment)


def stages(work: Path, processes: int) -> dict[str, tuple[Path, Callable[[], None]]]:
    """Name -> (file that proves the stage is complete, function that runs it)."""
    corpus, models = work / "corpus", REPOSITORY / "examples" / "models"
    pretrained, target = work / "target" / "model", work / "unloop" / "model"
    answers, head = work / "answers", work / "head" / "model"
    report = work / "evaluation.json"

    def train_target() -> None:
        run("train_target.py", "--corpus", corpus, "--out", work / "target", processes=processes)

    def unloop() -> None:
        arguments = ("--corpus", corpus, "--target", pretrained, "--out", work / "unloop")
        run("unloop.py", *arguments, processes=processes)

    def distill() -> None:
        arguments = ("--corpus", corpus, "--target", target, "--out", answers)
        run("distill.py", *arguments, processes=processes)
        (answers / "complete").touch()

    def train_head() -> None:
        arguments = ("--target", target, "--data", answers, "--out", work / "head")
        run("train_head.py", *arguments, processes=processes)

    def evaluate() -> None:
        arguments = ("--corpus", corpus, "--target", target, "--head", head, "--json", report)
        run("evaluate.py", *arguments)

    def install() -> None:
        for source, name in ((target, TARGET_NAME), (head, HEAD_NAME)):
            shutil.copytree(source, models / name, dirs_exist_ok=True)
        run("cards.py", "--work", work, "--models", models)

    return {
        "corpus": (corpus / "manifest.json", lambda: run("corpus.py", "--out", corpus)),
        "target": (pretrained / "config.json", train_target),
        "unloop": (target / "tokenizer.json", unloop),
        "distill": (answers / "complete", distill),
        "head": (head / "model.safetensors", train_head),
        "evaluate": (report, evaluate),
        "install": (work / "installed", install),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "pair")
    parser.add_argument("--processes", type=int, default=max(1, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    for name, (proof, action) in stages(args.work, args.processes).items():
        if proof.exists():
            print(f"[{name}] complete: {proof}")
            continue
        print(f"[{name}]", flush=True)
        action()


if __name__ == "__main__":
    main()
