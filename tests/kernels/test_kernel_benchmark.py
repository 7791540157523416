"""The kernel benchmark without a GPU: its checks are real, its cases make sense for a GPU too."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import aot
import kernel_cases
import kernel_timing
import pytest
import torch
from kernel_cases import Alternative, BenchCase


def load_script() -> ModuleType:
    """benchmarks/kernels.py, by its path: Transformers may have tried `import kernels` before, and
    then the name stands for the folder at the root of the repository.
    """
    path = Path(aot.__file__).with_name("kernels.py")
    spec = importlib.util.spec_from_file_location("kernel_benchmark_script", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kernels = load_script()

OPS = sorted(kernel_cases.modules())


def run(*arguments: str) -> int:
    return kernels.main(["--device", "cpu", "--quick", *arguments])


@pytest.mark.parametrize("op", OPS)
def test_smoke(op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--op", op, "--out", str(tmp_path / "smoke")) == 0
    assert "the times mean nothing" in capsys.readouterr().out
    rows = json.loads((tmp_path / "smoke.json").read_text())["rows"]
    assert rows
    for row in rows:
        assert row["error"] <= row["tolerance"]
        notes = [other["note"] for other in row["others"].values() if "note" in other]
        # Anything else is a fault of the benchmark's own, such as an alternative that differs.
        assert all(note.startswith(("not ", "needs a GPU")) for note in notes), notes


@pytest.mark.parametrize("op", OPS)
def test_launches_are_counted(op: str) -> None:
    for case in kernel_cases.modules()[op].bench_cases("cpu", torch.float32, quick=True):
        inputs = case.inputs()
        launches = aot.launches_of(lambda case=case, inputs=inputs: case.kernel(*inputs))
        # PyTorch's own come on top.
        assert 1 <= len(launches) <= case.launches


@pytest.mark.parametrize("op", OPS)
def test_sizes_of_a_gpu(op: str) -> None:
    """On a device without data: nothing is taken from or put on another one."""
    cases = list(kernel_cases.modules()[op].bench_cases("meta", torch.bfloat16, quick=False))
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        tensors = kernel_timing.tensors_of(case.inputs())
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert case.least_bytes > 0
    quick = list(kernel_cases.modules()[op].bench_cases("meta", torch.bfloat16, quick=True))
    assert {case.name for case in quick} < {case.name for case in cases}


def good_case() -> BenchCase:
    return BenchCase(
        name="double",
        inputs=lambda: (torch.randn(8),),
        kernel=lambda x: 2 * x,
        reference=lambda x: x + x,
        least_bytes=64,
        launches=1,
        tolerance=0.0,
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace all ops by some with the given cases."""

    def replace_ops(**ops: list[BenchCase]) -> None:
        modules = {
            name: SimpleNamespace(bench_cases=lambda *_, cases=cases: cases)
            for name, cases in ops.items()
        }
        monkeypatch.setattr(kernel_cases, "modules", lambda: modules)

    return replace_ops


def test_a_failing_check_stops_no_other_op(
    install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such luck")

    install(
        broken=[replace(good_case(), kernel=fail)],
        wrong=[replace(good_case(), kernel=lambda x: 2.01 * x)],
        right=[replace(good_case(), alternatives={"fails": Alternative(fail), "none": "no need"})],
    )
    assert run("--out", str(tmp_path / "rows")) == 1
    failures = capsys.readouterr().err
    assert "broken, double: RuntimeError: no such luck" in failures
    assert "wrong, double: differs from the reference" in failures
    assert failures.count("FAILED") == 2
    rows = {row["op"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert "kernel" not in rows["wrong"]  # nothing wrong is timed
    assert rows["right"]["others"]["fails"]["note"] == "RuntimeError: no such luck"
    assert rows["right"]["others"]["none"]["note"] == "no need"


def test_a_stage_keeps_the_rows_of_the_others(install: Callable[..., None], tmp_path: Path) -> None:
    install(a=[good_case()], b=[good_case()])
    stem = tmp_path / "rows"
    for op in ("b", "a", "b"):
        assert run("--op", op, "--out", str(stem)) == 0
    with stem.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["op"], line["implementation"]) for line in lines] == [
        (op, name) for op in "ab" for name in ("kernel", "reference")
    ]


def test_a_smoke_run_writes_no_file_by_itself(install: Callable[..., None]) -> None:
    install(a=[good_case()])
    assert kernels.parse_arguments(["--device", "cpu"]).out is None


def test_unwritten_memory_fails_the_check(install: Callable[..., None]) -> None:
    install(a=[replace(good_case(), kernel=lambda x: torch.empty(x.shape))])
    assert run() == 1


class StandInCuda:
    """Enough of torch.cuda to walk through the timing without a GPU."""

    def __init__(self) -> None:
        self.debug_mode = "default"
        self.replays = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counter = itertools.count()
        event = SimpleNamespace(record=lambda: next(counter), elapsed_time=lambda _: 0.001)
        names = {
            "is_available": lambda: True,
            "get_device_name": lambda: "Stand-in GPU (40 GB)",
            "get_device_properties": lambda: SimpleNamespace(L2_cache_size=0),
            "mem_get_info": lambda: (10**9, 10**9),
            "synchronize": lambda: None,
            "set_sync_debug_mode": lambda mode: setattr(self, "debug_mode", mode),
            "Event": lambda enable_timing: event,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
            "stream": lambda _: nullcontext(),
            "graph": lambda _: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 1e9)

    def replay(self) -> None:
        self.replays += 1

    def read_on_host(self, x: torch.Tensor) -> torch.Tensor:
        if self.debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return 2 * x


def test_on_a_gpu(
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuda = StandInCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    monkeypatch.setattr(kernel_timing, "ROTATED_BYTES", 6400)
    case = replace(good_case(), aim=0.85, reference=cuda.read_on_host)
    install(fast=[case], waiting=[replace(case, kernel=cuda.read_on_host)])
    assert kernels.main([]) == 1
    out, err = capsys.readouterr()
    assert out.index("predictions") < out.index("measured")
    assert "FAILED waiting, double: reads results on the host" in err
    assert cuda.debug_mode == "default"
    rows = {
        row["op"]: row
        for row in json.loads((tmp_path / "kernels-stand-in-gpu-40-gb.json").read_text())["rows"]
    }
    fast = rows["fast"]
    assert fast["predicted_us"] == pytest.approx(0.064 + 2)
    # 100 sets of inputs in one graph; a replay took 1 us.
    assert fast["kernel"]["us"] == pytest.approx(0.01)
    assert fast["copy_share"] == pytest.approx(6.4)
    assert fast["others"]["reference"]["how"] == "eager"
    assert fast["others"]["reference"]["times_kernel"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([3.0, 4.0], [0.0, 0.0], 5.0),
        ([3.3, 4.4], [3.0, 4.0], 0.1),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], 0.0),
        ([float("-inf"), 1.0], [0.0, 1.0], float("inf")),
        ([float("nan"), 1.0], [float("nan"), 1.0], float("inf")),
        ([1, 2, 3, 4], [1, 2, 3, 5], 0.25),
        ([1.0], [1], float("inf")),
        ([[1.0]], [1.0], float("inf")),
        ([], [], 0.0),
    ],
    ids=str,
)
def test_error_of(found: list, expected: list, error: float) -> None:
    a, b = torch.tensor(found), torch.tensor(expected)
    assert kernel_timing.error_of(a, b) == pytest.approx(error)
    assert kernel_timing.error_of((b, [a]), (b, [b])) == pytest.approx(error)
