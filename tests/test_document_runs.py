"""The documents' commands do what they say: those of seconds here, others in `make test-docs`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.document_commands import NOT_RUN, commands, reason_not_run, runnable, takes_seconds
from support.paths import HEAD, PROMPTS, ROOT, TARGET

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
ALL = [(path, command) for path in DOCUMENTS for command in commands(path)]
IN_SECONDS = sorted({c for _, c in ALL if takes_seconds(c) and not reason_not_run(c)})
IN_MINUTES = {
    path: rest
    for path in DOCUMENTS
    if (rest := [c for c in commands(path) if not reason_not_run(c) and not takes_seconds(c)])
}


def clone(folder: Path) -> Path:
    """A reader's clone with a few prompts; what commands write goes no further."""
    for name in ("docs", "kernels", "tests", "vllm_specformer"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "benchmarks" / "results").mkdir(parents=True)
    for path in (ROOT / "benchmarks").iterdir():
        if path.name != "results":
            (folder / "benchmarks" / path.name).symlink_to(path)
    # Copies: a calibration is written into the head.
    for pair in (HEAD, TARGET):
        shutil.copytree(pair, folder / pair.relative_to(ROOT))
    few = "".join(PROMPTS.read_text().splitlines(keepends=True)[:12])
    (folder / "prompts.jsonl").write_text(few)
    prompts = folder / "build" / "hour" / "prompts"
    prompts.mkdir(parents=True)
    for name in ("train", "held_out"):
        (prompts / f"{name}.jsonl").write_text(few)
    return folder


def run(command: str, folder: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What documents have from the guide that says how to make it."""
    folder = clone(tmp_path_factory.mktemp("answers"))
    run(runnable("specformer distill --target MODEL --prompts prompts.jsonl --out answers"), folder)
    return folder / "answers"


@pytest.mark.parametrize("command", IN_SECONDS)
def test_commands_of_seconds(command: str, tmp_path: Path) -> None:
    run(runnable(command), clone(tmp_path))


@pytest.mark.documents
@pytest.mark.parametrize("path", IN_MINUTES, ids=lambda path: path.name)
def test_commands_of_minutes(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One after the other in a clone, so that one may read what the one before has written."""
    folder = clone(tmp_path)
    if reads_answers(IN_MINUTES[path]):
        answers: Path = request.getfixturevalue("answers")
        shutil.copytree(answers, folder / "answers")
        shutil.copytree(answers, folder / "build" / "answers")
    for command in IN_MINUTES[path]:
        run(runnable(command), folder)


def reads_answers(commands_there: list[str]) -> bool:
    """Whether they read answers that none of them makes."""
    together = " ".join(commands_there)
    made = set(re.findall(r"--out (\S*answers)", together))
    return bool(set(re.findall(r"--data (\S*answers)", together)) - made)


def test_what_is_not_run_is_there() -> None:
    """A reason for a command that no document has any more is one too many."""
    for pattern, reason in NOT_RUN:
        assert any(re.search(pattern, command) for _, command in ALL), reason


def test_how_a_command_is_run() -> None:
    command = runnable("specformer distill --target MODEL --prompts p.jsonl --out HEAD-answers")
    assert command.startswith("python -m vllm_specformer.cli.main distill --target exam")
    assert command.endswith("}'")
    assert "--max-prompts 12" in command
    assert runnable("sed -n 1p file > other") == "sed -n 1p file > other"
