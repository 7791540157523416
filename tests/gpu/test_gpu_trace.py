"""What a trace says of a draft step, on one written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from gpu_stages.draft_clock import RANGE
from gpu_stages.trace import draft_figures


def event(kind: str, name: str, begin: float, length: float, call: int = 0) -> dict[str, Any]:
    arguments = {"correlation": call} if call else {}
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": length, "args": arguments}


def step(start: float, calls: int) -> list[dict[str, Any]]:
    """The host drafts for 10 us: a launch, a graph of three kernels and one of another stream.

    The target's kernel and a call that launches nothing stand beside them.
    """
    return [
        event("user_annotation", RANGE, start, 10),
        event("gpu_user_annotation", RANGE, start + 100, 50),
        event("cuda_runtime", "cudaLaunchKernel", start - 5, 1, calls),
        event("kernel", "target", start + 20, 60, calls),
        event("cuda_runtime", "cudaLaunchKernel", start + 1, 1, calls + 1),
        event("cuda_runtime", "cudaStreamIsCapturing", start + 3, 1, calls + 9),
        event("cuda_runtime", "cudaGraphLaunch", start + 5, 2, calls + 2),
        event("gpu_memcpy", "copy", start + 100, 4, calls + 1),
        event("kernel", "first", start + 110, 10, calls + 2),
        event("kernel", "beside it", start + 112, 4, calls + 2),
        event("kernel", "last", start + 125, 25, calls + 2),
    ]


def test_figures() -> None:
    trace = {"traceEvents": [{"ph": "M", "name": "process_name"}, *step(0, 1), *step(400, 21)]}
    found = draft_figures(trace)
    assert found["drafts"] == 2
    assert (found["launches"], found["host_launches"]) == (4, 2)
    assert (found["span"], found["busy"], found["gaps"]) == (50, 39, 11)
    assert found["period"] == 400
    assert found["share"] == pytest.approx(50 / 400)


def test_without_a_device() -> None:
    events = [event("user_annotation", RANGE, start, 10) for start in (0, 30)]
    found = draft_figures({"traceEvents": events})
    assert (found["launches"], found["span"], found["period"]) == (0, 0, 30)


def test_a_trace_of_something_else() -> None:
    with pytest.raises(ValueError, match="no draft step"):
        draft_figures({"traceEvents": [event("kernel", "k", 0, 1, 1)]})
