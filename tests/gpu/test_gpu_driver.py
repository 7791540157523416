"""The driver of the GPU benchmark: it goes on where it stopped, and no process outlives it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
from gpu_stages.plan import STAGES, Unit, units
from gpu_stages.store import Store


def dry(folder: Path, *arguments: str) -> int:
    return gpu.main(["--dry", "--out", str(folder), "--scratch", str(folder), *arguments])


def test_a_result_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage b, the one that starts no engine."""
    ran = "b, kernels: "
    assert dry(tmp_path, "--stage", "b", "--minutes", "0") == 0
    assert "2 of 2 units are left" in capsys.readouterr().out
    assert dry(tmp_path, "--stage", "b") == 0
    out = capsys.readouterr().out
    assert ran in out
    assert out.count("b  3 kernel cases right") == 2
    assert dry(tmp_path, "--stage", "b") == 0
    out = capsys.readouterr().out
    assert ran not in out
    assert "b  3 kernel cases right" in out


def test_a_failure_is_told_and_does_not_count(tmp_path: Path) -> None:
    args = gpu.parse_arguments(["--dry", "--out", str(tmp_path), "--scratch", str(tmp_path)])
    options = {"arguments": ["--nonsense"], "stem": str(tmp_path / "k")}
    unit, store = Unit("b", "wrong", "kernels", options, on_v1=True), Store(tmp_path)
    assert gpu.run_all([unit], store, args) == 1
    failure = store.read("b")["wrong"]["failure"]
    assert "unrecognized arguments: --nonsense" in failure
    assert str(tmp_path / "b-wrong.log") in failure
    assert store.finished("b") == {}


def test_a_unit_without_time_is_not_started(tmp_path: Path) -> None:
    args = gpu.parse_arguments(["--minutes", "1", "--out", str(tmp_path)])
    assert gpu.run_all([Unit("b", "long", "kernels", {}, expected=61)], Store(tmp_path), args) == 0
    assert Store(tmp_path).read("b") == {}


def test_no_process_is_left(tmp_path: Path) -> None:
    """An engine's own process must give the device back when its unit is ended."""
    pid_file = tmp_path / "pid"
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(99)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    command = [sys.executable, "-c", parent, child, str(pid_file)]
    process = subprocess.Popen(command, start_new_session=True)
    limit = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < limit:
        time.sleep(0.02)
    grandchild = int(pid_file.read_text())
    assert gpu.finish(process, 0.1) == "ended after 0 s"
    while is_running(grandchild) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not is_running(grandchild)


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended, as an orphan nobody has asked about may."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("is_dry", [True, False])
def test_the_plan(is_dry: bool, tmp_path: Path) -> None:
    found = units(is_dry, tmp_path, tmp_path)
    assert {unit.stage for unit in found} == set(STAGES)
    assert len({(unit.stage, unit.name) for unit in found}) == len(found)
    # Every unit fits a call of eight minutes, the default.
    assert all(unit.expected < unit.limit < 480 for unit in found)
    # What one call of eight minutes answers, in this order.
    names = [unit.name for unit in found]
    shape = "toy" if is_dry else "8b"
    pairs = [f"{arm}, {mode}" for mode in ("graphs", "eager") for arm in ("none", "specformer")]
    first = ["machine", *(pairs[2:] if is_dry else pairs), "correct"]
    first += [f"{shape} {arm}" for arm in ("none", "specformer-k4", "eagle3-k4")]
    assert names[: len(first)] == first
    assert sum(unit.expected for unit in found[: len(first)]) <= 480
    dense = [unit.name for unit in found if unit.options.get("dense")]
    assert dense == [pair for pair in first if pair.startswith("specformer, ")]
    # Trees come after all arms, each beside an engine without them in the same precision.
    trees = [unit for unit in found if "tree_nodes" in (unit.options.get("speculative") or {})]
    modes = ["eager"] if is_dry else ["graphs in bfloat16", "eager in bfloat16"]
    assert [unit.name for unit in trees] == [*(f"tree, {mode}" for mode in modes), "pair tree-n16"]
    for unit in trees[:-1]:
        none = next(u for u in found if u.name == unit.name.replace("tree", "none"))
        assert none.options["engine"] == unit.options["engine"]
    # A ratio needs its baseline, which therefore comes first.
    order = [unit.name for unit in found if unit.stage == "d"]
    assert order[-2:] == ["pair none", "pair tree-n16"]
    for shape in {name.split()[0] for name in order[:-2]}:
        own = [name for name in order if name.startswith(shape)]
        assert own[0] == f"{shape} none"
        assert own.index(f"{shape} none-v1") < own.index(f"{shape} peagle-k4")
