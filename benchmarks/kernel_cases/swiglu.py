"""Calls of swiglu: the slots of a draft step, with the feed-forward width of an 8B target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from specformer_kernels.swiglu import reference, triton_kernel

from kernel_cases import BenchCase, compiled, rounding

NUM_SLOTS, INNER = 8, 12288


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for inner in (512, INNER):
        rows = torch.zeros(4, 2 * inner, dtype=dtype)
        yield f"width {inner}", partial(triton_kernel.swiglu, rows)


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Draft steps of 1 to 128 requests."""
    batches, inner = [1, 16, 64, 128], INNER
    if device == "cpu":
        batches, inner = [2], 48
    elif quick:
        batches = [64]
    for requests in batches:
        rows = requests * NUM_SLOTS
        yield BenchCase(
            name=f"{rows} rows of {inner}",
            inputs=partial(
                lambda *shape: (torch.randn(shape, dtype=dtype, device=device),), rows, 2 * inner
            ),
            kernel=triton_kernel.swiglu,
            reference=reference.swiglu,
            least_bytes=3 * rows * inner * dtype.itemsize,
            launches=1,
            tolerance=rounding(dtype),
            alternatives={"torch.compile": compiled(reference.swiglu)},
        )
