"""Calls of rotate_slots: 8 slots of 32 query and 8 K/V heads of 128, as an 8B target has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from specformer_kernels.rotate_slots import reference, triton_kernel

from kernel_cases import BenchCase, compiled, rounding

NUM_SLOTS, NUM_HEADS, MAX_POSITION = 8, 40, 4096


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for head_size in (64, 128, 256):
        inputs = _random_inputs(4, NUM_SLOTS, NUM_HEADS, head_size, dtype, "cpu")
        yield f"head size {head_size}", partial(triton_kernel.rotate_slots, *inputs)


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Draft steps of 1 to 128 requests."""
    batches, heads, head_size = [1, 16, 64, 128], NUM_HEADS, 128
    if device == "cpu":
        batches, heads, head_size = [2], 3, 16
    elif quick:
        batches = [64]
    for requests in batches:
        rows = requests * NUM_SLOTS
        yield BenchCase(
            name=f"{NUM_SLOTS} slots, {requests} requests",
            inputs=partial(_random_inputs, requests, NUM_SLOTS, heads, head_size, dtype, device),
            kernel=triton_kernel.rotate_slots,
            reference=reference.rotate_slots,
            least_bytes=rows * head_size * (2 * heads * dtype.itemsize + 4) + 8 * requests,
            launches=1,
            tolerance=rounding(dtype),
            alternatives={"torch.compile": compiled(reference.rotate_slots)},
        )


def _random_inputs(
    requests: int, slots: int, heads: int, head_size: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    x = torch.randn(requests, slots, heads, head_size, dtype=dtype, device=device)
    table = torch.randn(MAX_POSITION, head_size, device=device)
    anchors = torch.randint(0, MAX_POSITION - slots, (requests,), device=device)
    return x, table, anchors
