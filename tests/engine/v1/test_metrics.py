"""The way of the draft time from a worker to the server's /metrics page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm.logger  # noqa: F401  its import makes folders, which one test here forbids
from prometheus_client import CollectorRegistry

from vllm_specformer.engine import metrics
from vllm_specformer.engine.metrics import FOLDER, DraftClock, DraftTimeCollector, publish

CPU = torch.device("cpu")
FIRST = SimpleNamespace(rank=0, data_parallel_index=0)


def numbers(folder: Path, engine: str = "0") -> tuple[float | None, float | None]:
    registry = CollectorRegistry()
    registry.register(DraftTimeCollector(folder))
    seconds, steps = (
        registry.get_sample_value(f"specformer:draft_{name}_total", {"engine": engine})
        for name in ("seconds", "steps")
    )
    return seconds, steps


def test_steps_and_seconds_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    clock = DraftClock(CPU, FIRST)
    assert numbers(tmp_path) == (0, 0)
    assert [clock.timed(lambda: 7) for _ in range(3)] == [7, 7, 7]
    seconds, steps = numbers(tmp_path)
    assert steps == 3
    assert 0 < (seconds or 0) < 1


def test_engines_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    DraftClock(CPU, SimpleNamespace(rank=0, data_parallel_index=1)).timed(lambda: None)
    assert numbers(tmp_path) == (None, None)
    assert numbers(tmp_path, "1")[1] == 1


def test_engines_with_one_index_are_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two `LLM`s in one process, or one after the other."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    clocks = [DraftClock(CPU, FIRST) for _ in range(2)]
    for clock in (*clocks, clocks[0]):
        clock.timed(lambda: None)
    assert numbers(tmp_path)[1] == 3


def test_only_the_first_worker_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    DraftClock(CPU, SimpleNamespace(rank=1, data_parallel_index=0)).timed(lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_serving_goes_on_without_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine than the server's, or with a full disk."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    assert DraftClock(CPU, FIRST).timed(lambda: 7) == 7
    monkeypatch.delenv(FOLDER)
    assert DraftClock(CPU, FIRST).timed(lambda: 7) == 7
    (tmp_path / "no-folder").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no-folder"))
    monkeypatch.setattr(metrics, "_published", False)
    publish()
    assert FOLDER not in os.environ


def test_the_folder_goes_with_the_process(tmp_path: Path) -> None:
    code = (
        "import os; from vllm_specformer.engine.metrics import FOLDER, publish; "
        "publish(); publish(); print(os.environ[FOLDER], os.path.isdir(os.environ[FOLDER]))"
    )
    environment = os.environ | {FOLDER: str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    folder, existed = run.stdout.split()
    assert existed == "True"
    assert not Path(folder).exists()
    assert folder != str(tmp_path), "the folder of the server that started this process"
    assert tmp_path.exists()
