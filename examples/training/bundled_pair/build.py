"""The recipe of the bundled pair: one command from the interpreter's sources to served models.

    make pair                                                      # hours on two cores
    python examples/training/bundled_pair/build.py --keep-target   # a new head only
    python examples/training/bundled_pair/build.py --data-only     # answers, for the ablation

The target is made here; its head is made by `specformer distill`, `train` and `eval`, as anybody's
is. Every stage shows a progress bar, is seeded, and continues where it stopped when the command is
given again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
# Relative paths, as they end up in the records and cards of the pair.
HERE = Path("examples", "training", "bundled_pair")
MODELS = Path("examples", "models")
TARGET = MODELS / "python-target"
SPECFORMER = ("-m", "vllm_specformer.cli.main")
MAX_TOKENS = 160
# A small model in a small cache; several processes of a machine then fit side by side.
ENGINE = '{"kv_cache_memory_bytes": 536870912, "enforce_eager": true}'


@dataclass(frozen=True)
class Stage:
    """Commands, as arguments of Python; `parallel` ones run once per core, data-parallel."""

    name: str
    commands: tuple[tuple[str | Path, ...], ...]
    parallel: bool = False


def target_stages(work: Path) -> list[Stage]:
    corpus, pretrained = work / "corpus", work / "target"
    train = (HERE / "train_target.py", "--corpus", corpus, "--out", pretrained)
    unloop = (HERE / "unloop.py", "--corpus", corpus, "--target", pretrained / "model")
    return [
        Stage("target", (train,), parallel=True),
        Stage("unloop", ((*unloop, "--out", work / "unloop"),), parallel=True),
    ]


def data_stages(work: Path, target: Path) -> list[Stage]:
    """Answers to training prompts, and greedy and sampled ones to held-out prompts."""

    def distill(split: str, out: str, *options: str) -> tuple[str | Path, ...]:
        prompts = work / "prompts" / f"{split}.jsonl"
        what = ("--target", target, "--prompts", prompts, "--out", work / out)
        limits = ("--max-tokens", str(MAX_TOKENS), "--engine-args", ENGINE)
        return (*SPECFORMER, "distill", *what, *limits, *options)

    prompts = (HERE / "prompts.py", "--corpus", work / "corpus", "--out", work / "prompts")
    greedy = distill("held_out", "held_out_greedy", "--sampled-share", "0")
    sampled = distill("held_out", "held_out_sampled", "--sampled-share", "0", "--temperature", "1")
    return [
        Stage("prompts", (prompts,)),
        Stage("held-out answers", (greedy, sampled)),
        Stage("answers", (distill("train", "answers"),)),
    ]


def head_stages(work: Path, target: Path, new_target: bool) -> list[Stage]:
    head = work / "head"
    train = (*SPECFORMER, "train", "--target", target, "--data", work / "answers", "--out", head)
    # A hook after every layer: with so few layers that costs little (docs/ablation.md).
    hooks = ("--hooks", "0,1,2,3,4,5,6")
    length = ("--max-steps", "5000", "--batch-tokens", "1024", "--anchors-per-text", "48")
    options = (
        "--target-name",
        "../python-target",
        *hooks,
        *length,
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    )
    measure = (*SPECFORMER, "eval", head, "--target", target, "--max-prompts", "384")
    install = (HERE / "install.py", "--work", work, "--models", MODELS)
    figures = [
        (*measure, "--data", work / f"held_out_{kind}", "--json", work / f"eval-{kind}.json")
        for kind in ("greedy", "sampled")
    ]
    return [
        Stage("head", ((*train, *options),), parallel=True),
        Stage("figures", tuple(figures)),
        Stage("install", ((*install, *(("--target",) if new_target else ())),)),
    ]


def run(stage: Stage, processes: int) -> None:
    """Single-threaded data-parallel processes beat threads on models of this size."""
    launcher = [sys.executable]
    environment = dict(os.environ)
    if stage.parallel and processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
        environment["OMP_NUM_THREADS"] = "1"
    for command in stage.commands:
        print("+", " ".join(map(str, command)), flush=True)
        subprocess.run([*launcher, *map(str, command)], check=True, env=environment)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build", "pair"))
    parser.add_argument("--processes", type=int, default=max(1, os.cpu_count() or 1))
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--keep-target", action="store_true", help="a new head for the bundled target"
    )
    part.add_argument(
        "--data-only", action="store_true", help="answers of the bundled target, no new pair"
    )
    args = parser.parse_args(argv)
    os.chdir(REPOSITORY)
    work = args.work
    new_target = not (args.keep_target or args.data_only)
    target = work / "unloop" / "model" if new_target else TARGET
    stages = [Stage("corpus", ((HERE / "corpus.py", "--out", work / "corpus"),))]
    stages += target_stages(work) if new_target else []
    stages += data_stages(work, target)
    stages += [] if args.data_only else head_stages(work, target, new_target)
    for stage in stages:
        done = work / "done" / stage.name
        if done.exists():
            continue
        print(f"[{stage.name}]", flush=True)
        run(stage, args.processes)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()


if __name__ == "__main__":
    main()
