"""Calls of place_trees: requests that all verify a tree, in an engine of 256 requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from specformer_kernels.place_trees import TreeTable, reference, triton_kernel

from kernel_cases import BenchCase

NUM_NODES, MAX_REQUESTS = 16, 256
# Position, bits read and written, depth, path; and of a request its counts and its root.
ROW_BYTES, REQUEST_BYTES = 8 + 16 + 4 + 4, 37


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call; nothing depends on the target's dtype, nor the tiles on the tree."""
    inputs = random_inputs(4, NUM_NODES, "cpu")
    yield f"trees of {NUM_NODES}", partial(triton_kernel.place_trees, *inputs)


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Verification steps of 1 to 256 requests."""
    for requests in [2] if device == "cpu" else [64] if quick else [1, 16, 64, 256]:
        yield BenchCase(
            name=f"trees of {NUM_NODES}, {requests} requests",
            inputs=partial(random_inputs, requests, NUM_NODES, device),
            kernel=partial(_placed, triton_kernel.place_trees),
            reference=partial(_placed, reference.place_trees),
            least_bytes=requests * ((NUM_NODES + 1) * ROW_BYTES + REQUEST_BYTES) + 4 * MAX_REQUESTS,
            launches=1,
            tolerance=0.0,
        )


def random_inputs(requests: int, nodes: int, device: str) -> tuple[Any, ...]:
    """Words that need not be trees: where they go does not depend on what they say."""
    rows, states = requests * (nodes + 1), MAX_REQUESTS + 1

    def drawn(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(high, shape, dtype=dtype, device=device)

    depths, parents, paths = drawn(nodes, 3, states, nodes + 1, dtype=torch.int32)
    depths[:, 0] = 0
    tokens, mask = drawn(2**62, 2, states, nodes + 1)
    roots, live = drawn(4096, states), torch.ones(states, dtype=torch.bool, device=device)
    starts = torch.arange(0, rows + 1, nodes + 1, dtype=torch.int32, device=device)
    mapping = torch.randperm(MAX_REQUESTS, device=device)[:requests]
    positions, lens = drawn(4096, rows), drawn(4096, requests, dtype=torch.int32)
    roots[mapping] = positions[:: nodes + 1]
    table = TreeTable(roots, tokens, parents, depths, mask, live, paths)
    context_lens = drawn(1, MAX_REQUESTS, dtype=torch.int32)
    return table, starts, starts, mapping, lens, positions, drawn(1, rows), context_lens


def _placed(place: Callable[..., None], table: TreeTable, *inputs: torch.Tensor) -> tuple[Any, ...]:
    place(table, *inputs)
    return table.is_live.int(), table.paths, *inputs[-3:]
