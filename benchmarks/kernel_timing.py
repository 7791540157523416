"""Timing and checking of calls on a GPU; without one, a single wall-clock reading."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]

# Inputs are rotated over this much memory, so that no cache serves them again.
ROTATED_BYTES = 200_000_000
COPY_BYTES = 2**30
# Device time spent on one measurement after the warm-up, and the bounds of its repeats.
BUDGET_SECONDS, MIN_REPEATS, MAX_REPEATS = 0.2, 3, 200
MAX_INPUTS = 4096
# Calls in a graph, at least: the replay's own launch, some microseconds, is shared by them.
MIN_CALLS = 16


@dataclass(frozen=True)
class Timing:
    seconds: float  # median of one call
    low: float  # 20th percentile
    high: float  # 80th percentile
    how: str  # "graph": replayed, without the host's work between launches; else "eager"


def error_of(found: Any, expected: Any) -> float:
    """Relative RMS error; for integers the share of entries that differ; the worst of a tuple."""
    if expected is None:
        return 0.0 if found is None else float("inf")
    if isinstance(expected, list | tuple):
        return max(error_of(a, b) for a, b in zip(found, expected, strict=True))
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return float((found != expected).double().mean()) if expected.numel() else 0.0
    # Infinities must agree in place; relative to zeros, any difference counts in full.
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(
        found[~finite], expected[~finite]
    ):
        return float("inf")
    difference = torch.linalg.vector_norm((found - expected)[finite], dtype=torch.float32)
    norm = torch.linalg.vector_norm(expected[finite], dtype=torch.float32)
    return float(difference / norm) if norm else float(difference)


def rotation(
    inputs: Callable[[], tuple[Any, ...]], least_bytes: int, device: str
) -> list[tuple[Any, ...]]:
    """Enough sets of inputs to leave the caches between two uses of one; one set on a CPU."""
    first = inputs()
    if device != "cuda":
        return [first]
    rotated = max(ROTATED_BYTES, 2 * torch.cuda.get_device_properties().L2_cache_size)
    held = sum(tensor.nbytes for tensor in tensors_of(first))
    affordable = torch.cuda.mem_get_info()[0] // (4 * max(held, 1))
    copies = max(1, min(-(-rotated // least_bytes), affordable, MAX_INPUTS))
    return [first, *(inputs() for _ in range(copies - 1))]


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for element in value for tensor in tensors_of(element)]
    return []


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = time_calls(lambda: target.copy_(source), [()], "cuda")
    return 2 * COPY_BYTES / timing.seconds


def reads_on_host(call: Call, arguments: tuple[Any, ...]) -> bool:
    """Whether the call waits for the device, so that no graph can hold it."""
    call(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*arguments)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def time_calls(call: Call, inputs: Sequence[tuple[Any, ...]], device: str) -> Timing:
    """Median time of one call, over inputs taken in turn."""
    if device != "cuda":
        start = time.perf_counter()
        call(*inputs[0])
        elapsed = time.perf_counter() - start
        return Timing(elapsed, elapsed, elapsed, "eager")
    if reads_on_host(call, inputs[0]):
        return _time_eager(call, inputs)
    return _time_graph(call, inputs)


def _time_graph(call: Call, inputs: Sequence[tuple[Any, ...]]) -> Timing:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in inputs[:3]:
            call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    calls = max(len(inputs), MIN_CALLS)
    # Kept for a round, or every call would write its result to the same, soon cached, memory.
    results: deque[Any] = deque(maxlen=len(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in itertools.islice(itertools.cycle(inputs), calls):
            results.append(call(*arguments))
    return _timing([seconds / calls for seconds in _repeat(graph.replay)], "graph")


def _time_eager(call: Call, inputs: Sequence[tuple[Any, ...]]) -> Timing:
    rotating = itertools.cycle(inputs)
    return _timing(_repeat(lambda: call(*next(rotating))), "eager")


def _repeat(action: Callable[[], object]) -> list[float]:
    """Seconds of each run between CUDA events, after a warm-up that also sets their number."""
    action()
    pilot = _elapsed(action, 1)[0]
    repeats = int(min(max(BUDGET_SECONDS / max(pilot, 1e-6), MIN_REPEATS), MAX_REPEATS))
    return _elapsed(action, repeats)


def _elapsed(action: Callable[[], object], repeats: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]


def _timing(seconds: list[float], how: str) -> Timing:
    fifths = statistics.quantiles(seconds, n=5)
    return Timing(statistics.median(seconds), fifths[0], fifths[-1], how)
