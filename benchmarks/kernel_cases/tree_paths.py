"""Calls of tree_paths: requests that have verified trees, of which a path of 4 nodes stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from specformer_kernels.tree_paths import reference, triton_kernel

from kernel_cases import BenchCase
from kernel_cases.place_trees import NUM_NODES, random_inputs

ACCEPTED = 4
# Slot read and written, two slots of a move, path; and of a request its counts and its last row.
ROW_BYTES, REQUEST_BYTES = 16 + 16 + 4, 25


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for nodes in (NUM_NODES, 63):
        call = partial(triton_kernel.tree_paths, *_verified_inputs(4, nodes, "cpu"))
        yield f"trees of {nodes}", call


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Verified steps of 1 to 256 requests."""
    for requests in [2] if device == "cpu" else [64] if quick else [1, 16, 64, 256]:
        yield BenchCase(
            name=f"trees of {NUM_NODES}, {requests} requests",
            inputs=partial(_verified_inputs, requests, NUM_NODES, device),
            kernel=triton_kernel.tree_paths,
            reference=reference.tree_paths,
            least_bytes=requests * ((NUM_NODES + 1) * ROW_BYTES + REQUEST_BYTES),
            launches=2,  # PyTorch's copy of the slots is one
            tolerance=0.0,
        )


def _verified_inputs(requests: int, nodes: int, device: str) -> tuple[Any, ...]:
    table, starts, _, mapping, *_ = random_inputs(requests, nodes, device)
    order = torch.rand(len(table.roots), nodes, device=device).argsort(dim=-1)
    table.paths.fill_(-1)[:, 0] = 0
    table.paths[:, 1 : ACCEPTED + 1] = order[:, :ACCEPTED].sort(dim=-1).values + 1
    rejected = torch.full((requests,), nodes - ACCEPTED, dtype=torch.int32, device=device)
    slots = torch.randperm(requests * (nodes + 1), device=device)
    return table, starts, mapping, rejected, slots
