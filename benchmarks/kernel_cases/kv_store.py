"""Calls of kv_store: 8 K/V heads and 32 query heads of 128, as an 8B target has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from specformer_kernels.kv_store import reference, triton_kernel

from kernel_cases import BenchCase, compiled, rounding

NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, MAX_POSITION = 32, 8, 16, 4096
ROWS_PER_REQUEST = 9  # a token and its 8 drafts
# Aimed at where bytes, not launches, take the time.
AIM, AIM_ROWS = 0.85, 8192


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for head_size in (80, 128, 256):
        arguments = _random_inputs(4, 18, (NUM_HEADS, NUM_KV_HEADS, head_size), dtype, "cpu")
        yield f"head size {head_size}", partial(_store, triton_kernel.kv_store, *arguments)
    copied = partial(triton_kernel.kv_store, *arguments[:4])
    yield "without rotation, head size 256", copied


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Verification steps of 1 to 128 requests with their anchors' queries, and a prefill."""
    sizes = [(requests, requests * ROWS_PER_REQUEST) for requests in (1, 16, 64, 128)]
    sizes.append((1, AIM_ROWS))
    heads = (NUM_HEADS, NUM_KV_HEADS, 128)
    if device == "cpu":
        sizes, heads = [(2, 5)], (4, 2, 16)
    if quick:
        sizes = sizes[-2:]
    num_heads, num_kv_heads, head_size = heads
    for requests, rows in sizes:
        moved = 2 * (2 * rows * num_kv_heads + requests * num_heads) * head_size * dtype.itemsize
        indices = 16 * rows + 8 * requests
        angles = min(MAX_POSITION, rows + requests) * head_size * 4
        yield BenchCase(
            name=f"{requests} requests, {rows} rows",
            inputs=partial(_random_inputs, requests, rows, heads, dtype, device),
            kernel=partial(_store, triton_kernel.kv_store),
            reference=partial(_store, reference.kv_store),
            least_bytes=moved + indices + angles,
            launches=1,
            tolerance=rounding(dtype),
            aim=AIM if rows >= AIM_ROWS else None,
            alternatives={"torch.compile": compiled(partial(_store, _in_pytorch))},
        )


def _random_inputs(
    requests: int, rows: int, heads: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    num_heads, num_kv_heads, head_size = heads
    num_blocks = -(-rows // BLOCK_SIZE)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    def positions(count: int) -> torch.Tensor:
        return torch.randint(0, MAX_POSITION, (count,), device=device)

    key, value = draw(rows, 2 * num_kv_heads, head_size).chunk(2, dim=1)
    angles = torch.rand(MAX_POSITION, head_size // 2, device=device)
    return (
        key,
        value,
        draw(num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size),
        torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:rows],
        torch.cat((angles.cos(), angles.sin()), dim=-1),
        positions(rows),
        draw(requests, num_heads, head_size),
        positions(requests),
    )


def _store(
    store: Callable[..., torch.Tensor | None],
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    query: torch.Tensor,
    query_positions: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    rotated = store(
        key,
        value,
        cache,
        slots,
        rotary_table=table,
        positions=positions,
        query=query,
        query_positions=query_positions,
    )
    return rotated, cache


def _in_pytorch(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, **rest: Any
) -> torch.Tensor:
    """Without the reference's look at the slots on the host, which breaks a graph."""
    table = rest["rotary_table"]
    rows = torch.cat((reference.rotate(key, table, rest["positions"]), value), dim=-1)
    cache.transpose(1, 2)[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = rows
    return reference.rotate(rest["query"], table, rest["query_positions"])
