"""Runs of `specformer train` on the toy target, by its command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vllm_specformer.cli.main import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ARGUMENTS = {
    "slots": 3,
    "markov-rank": 4,
    "max-steps": 12,
    "dtype": "float32",
    "batch-tokens": 128,
    "log-every": 2,
    "eval-every": 4,
    "save-every": 3,
}


def command(pair: Path, out: Path, **changes: Any) -> list[str]:
    """The command line; `changes` overrides, None leaves an option out."""
    arguments: dict[str, Any] = {"target": pair / "target", "data": pair / "data", "out": out}
    arguments |= ARGUMENTS | {name.replace("_", "-"): value for name, value in changes.items()}
    line = ["train"]
    for name, value in arguments.items():
        if isinstance(value, bool):
            line.append(f"--{'' if value else 'no-'}{name}")
        elif isinstance(value, tuple):
            line += [f"--{name}", *map(str, value)]
        elif value is not None:
            line += [f"--{name}", str(value)]
    return line


def train(pair: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Run to the end; returns the provenance."""
    assert main(command(pair, out, **changes)) == 0
    return json.loads((out / "provenance.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], line: list[str]) -> str:
    """Run what must be refused; returns the message, which is one line without a traceback."""
    capsys.readouterr()
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (message,) = [text for text in error.splitlines() if text.startswith("specformer train: ")]
    return message
