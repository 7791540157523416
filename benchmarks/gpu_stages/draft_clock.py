"""Times every call of the drafter's `propose` inside vLLM's worker, with any method and runner.

Given to vLLM as `worker_extension_cls`, its official way to add methods to a worker, so it works in
whatever process the worker runs in.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

QUALIFIED_NAME = f"{__name__}.DraftClock"
# What a trace shows a draft under.
RANGE = "specformer-gpu: draft"


class DraftClock:
    """Methods added to the worker; `collective_rpc` calls them by name."""

    def start_draft_clock(self) -> None:
        """Forget what was timed; the first call puts the clock in place."""
        drafter = _drafter(self)
        if drafter is None:
            return
        if not hasattr(drafter, "measuring_clock"):
            _time_propose(drafter, self.device)  # type: ignore[attr-defined]
        drafter.measuring_clock.reset()
        drafter.draft_seconds.clear()

    def read_draft_clock(self) -> list[float]:
        """Milliseconds of every draft since the start; empty without a drafter."""
        drafter = _drafter(self)
        if drafter is None:
            return []
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        drafter.measuring_clock.read_passed()
        return [1e3 * seconds for seconds in drafter.draft_seconds]

    def describe_drafter(self) -> dict[str, Any]:
        """The drafter's class, its graphs, and the memory that the models' weights take."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        drafter = _drafter(self)
        graphs = getattr(drafter, "query_cudagraph_manager", None)
        return {
            "drafter": type(drafter).__name__ if drafter is not None else None,
            "draft_graphs": sorted(d.num_reqs or 0 for d in getattr(graphs, "graphs", {})),
            "weights_gib": getattr(runner, "model_memory_usage", 0) / 2**30,
            "peak_gib": _peak_bytes() / 2**30,
        }

    def start_trace(self) -> None:
        """Record what the worker launches from here on."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.draft_trace = torch.profiler.profile(activities=kinds)
        self.draft_trace.start()

    def write_trace(self, path: str) -> None:
        """Stop recording and write a Chrome trace."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.draft_trace.stop()
        self.draft_trace.export_chrome_trace(path)
        del self.draft_trace


def _drafter(worker: Any) -> Any:
    """V2's speculator or V1's drafter."""
    runner = worker.model_runner
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def _time_propose(drafter: Any, device: torch.device) -> None:
    from vllm_specformer.engine.metrics import DeviceClock

    propose, drafter.draft_seconds = drafter.propose, []
    clock = DeviceClock(device, lambda seconds, _: drafter.draft_seconds.append(seconds))

    @functools.wraps(propose)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(RANGE):
            return clock.timed(functools.partial(propose, *args, **kwargs))

    drafter.measuring_clock, drafter.propose = clock, timed


def _peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
