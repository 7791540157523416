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
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_specformer.engine import metrics
from vllm_specformer.engine.metrics import (
    FOLDER,
    JUDGED_DRAFTS,
    SHARED_FOLDER,
    AcceptanceMonitor,
    DeviceClock,
    DraftClock,
    publish,
)

CPU = torch.device("cpu")
FIRST = SimpleNamespace(rank=0, data_parallel_index=0)


def numbers(folder: Path, engine: str = "0") -> tuple[float | None, float | None]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
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


def test_a_warm_up_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    clock = DraftClock(CPU, FIRST)
    clock.timed(lambda: None)
    clock.reset()
    assert numbers(tmp_path) == (0, 0)
    clock.timed(lambda: None)
    assert numbers(tmp_path)[1] == 1


def test_rejections_of_a_warm_up_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[tuple[str, float, str]] = []
    monkeypatch.setattr(metrics.logger, "warning", lambda *words: warnings.append(words))
    monitor = AcceptanceMonitor(CPU)
    for drafted in (JUDGED_DRAFTS - 1, JUDGED_DRAFTS):  # a window not full, and one to be judged
        monitor.observe(drafted, torch.tensor([drafted]))
        monitor.reset()
    for _ in range(3):
        monitor.observe(JUDGED_DRAFTS, torch.tensor([JUDGED_DRAFTS // 2]))
    assert warnings == []
    for _ in range(3):
        monitor.observe(JUDGED_DRAFTS, torch.tensor([JUDGED_DRAFTS]))
    ((text, accepted, _),) = warnings
    assert accepted == 0
    # True in a server and in `specformer eval --serve`.
    assert "so speculation costs more than it brings here" in text


class Event:
    """Of a stream that stands still until `reached`; times are those of recording."""

    reached = False
    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.milliseconds = 1000.0 * Event.recorded

    def query(self) -> bool:
        return Event.reached

    def elapsed_time(self, end: Event) -> float:
        return end.milliseconds - self.milliseconds


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "reached", False)
    found: list[tuple[float, int]] = []
    clock = DeviceClock(torch.device("cuda"), lambda *step: found.append(step))
    assert clock.timed(lambda: 7) == 7
    clock.reset()
    clock.timed(lambda: None)
    clock.timed(lambda: None, counts=0)
    assert found == []
    monkeypatch.setattr(Event, "reached", True)
    clock.read_passed()
    assert found == [(1.0, 1), (1.0, 0)]


def test_every_api_server_shows_them(tmp_path: Path) -> None:
    """`--api-server-count 2`: vLLM's pages then show a folder, and no collector of a process."""
    code = """
import torch
from types import SimpleNamespace
from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus, get_prometheus_registry
setup_multiprocess_prometheus()
from vllm_specformer.engine.metrics import DraftClock, publish
publish()
clock = DraftClock(torch.device("cpu"), SimpleNamespace(rank=0, data_parallel_index=1))
clock.timed(lambda: None)
value = get_prometheus_registry().get_sample_value
print(value("specformer:draft_steps_total", {"engine": "1"}))
"""
    environment = {key: value for key, value in os.environ.items() if key != SHARED_FOLDER}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1.0"]


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
    monkeypatch.delenv(SHARED_FOLDER, raising=False)
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
