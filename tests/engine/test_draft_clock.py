"""The clock of the draft step: off unless asked for, and read from another process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_specformer.engine.draft_clock import VARIABLE, clocked, read_clocks

PROCESS = """
import sys, time
from vllm_specformer.engine.draft_clock import clocked

class Proposer:
    @clocked
    def propose(self, seconds, *, result):
        time.sleep(seconds)
        return result

for number in range(3):
    assert Proposer().propose(0.02, result=number) == number
"""


def propose() -> None:
    time.sleep(0.01)


def test_nothing_is_wrapped_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert clocked(propose) is propose


def test_steps_and_seconds_add_up_over_processes(tmp_path: Path) -> None:
    directory = tmp_path / "clock"
    assert read_clocks(directory) == (0, 0.0)
    environment = os.environ | {VARIABLE: str(directory)}
    for processes in (1, 2):
        subprocess.run([sys.executable, "-c", PROCESS], env=environment, check=True)
        steps, seconds = read_clocks(directory)
        assert steps == 3 * processes
        assert 0.06 * processes <= seconds < 2 * processes


def test_a_process_that_does_not_draft_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "clock"))
    timed = clocked(propose)
    assert not (tmp_path / "clock").exists()
    timed()
    assert read_clocks(tmp_path / "clock")[0] == 1
