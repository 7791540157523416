"""Calls of kv_compact: paths of 8 and of the most nodes in 32 layers, heads of 128 and 256."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from specformer_kernels.kv_compact import cache_addresses, reference, triton_kernel

from kernel_cases import BenchCase, compiled

NUM_REQUESTS, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS = 4, 8, 16, 8
NUM_MOVES, NUM_LAYERS = 8, 32


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for num_moves, head_size in ((8, 128), (64, 128), (8, 256)):
        cache = torch.zeros(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * head_size, dtype=dtype)
        slots = torch.zeros(NUM_REQUESTS, num_moves, dtype=torch.int64)
        call = partial(triton_kernel.kv_compact, NUM_LAYERS * [cache], slots, slots)
        yield f"{num_moves} moves, {NUM_LAYERS} layers, head size {head_size}", call


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """The accepted paths of 1 to 128 requests: 8 of the 16 rows a tree left in a page."""
    batches, num_layers, num_kv_heads, head_size = [1, 16, 64, 128], NUM_LAYERS, NUM_KV_HEADS, 128
    if device == "cpu":
        batches, num_layers, num_kv_heads, head_size = [2], 3, 2, 16
    elif quick:
        batches = [64]
    for requests in batches:
        shape = (requests, num_kv_heads, BLOCK_SIZE, 2 * head_size)
        moved = 2 * 2 * num_layers * num_kv_heads * head_size * dtype.itemsize
        yield BenchCase(
            name=f"{NUM_MOVES} moves, {num_layers} layers, {requests} requests",
            inputs=partial(_random_inputs, num_layers, shape, dtype, device),
            kernel=partial(_compact, triton_kernel.kv_compact),
            reference=partial(_compact, reference.kv_compact),
            least_bytes=requests * NUM_MOVES * (moved + 16),
            launches=1,
            tolerance=0.0,
            alternatives={"torch.compile": compiled(partial(_compact, reference.kv_compact))},
        )


def _random_inputs(
    num_layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Any, ...]:
    """Caches, slots, and the caches' addresses, which a CUDA graph's call needs."""
    caches = [torch.randn(shape, dtype=dtype, device=device) for _ in range(num_layers)]
    page = BLOCK_SIZE * torch.arange(shape[0], device=device)[:, None]
    # Targets are the first slots of the page; no source is its own target.
    order = torch.rand(shape[0], BLOCK_SIZE - 1, device=device).argsort(dim=-1)
    source = order[:, :NUM_MOVES].sort(dim=-1).values + 1
    target = torch.arange(NUM_MOVES, device=device)
    return caches, page + source, page + target, cache_addresses(caches)


def _compact(compact: Callable[..., None], caches: list[Any], *inputs: torch.Tensor) -> list[Any]:
    compact(caches, *inputs)
    return caches
