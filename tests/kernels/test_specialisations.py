"""Serving compiles nothing: a kernel's variants do not depend on a step's requests and rows.

Triton compiles a variant per class of an integer (1, a multiple of 16, other) and of a pointer
(aligned to 16 bytes or not), unless it is told not to look.
"""

from __future__ import annotations

import functools

import aot
import torch
from specformer_kernels.block_attention.launch import block_attention
from specformer_kernels.grouped_rms_norm.triton_kernel import grouped_rms_norm
from specformer_kernels.kv_store.triton_kernel import kv_store
from torch import Tensor
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import create_function_from_signature

HEADS, KV_HEADS, SIZE, PAGE, MOST = 8, 2, 64, 16, 256
CACHE = torch.zeros(4, KV_HEADS, PAGE, 2 * SIZE)
SLOTS = torch.full((4096,), -1)
TABLE = torch.zeros(512, SIZE)
# Requests of a batch, and rows of a prefill, of every class that Triton tells apart and more.
BATCHES = (*range(1, 35), 48, 63, 64, 100, 128, 255, 256)
ROWS = (*range(1, 40), 63, 64, 65, 511, 512, 1000, 2047, 2048)


def variants(launches: list[aot.Launch]) -> set[str]:
    """What Triton looks a compiled kernel up by."""
    found = set()
    for launch in launches:
        kernel = launch.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, BaseBackend)
        _, specialization, options = bind(*launch.args, **launch.kwargs)
        found.add(f"{launch.name} {specialization} {options}")
    return found


def store(start: int, rows: int, requests: int | None) -> None:
    """Rows from somewhere in the buffers; with queries of so many requests."""
    fused = torch.zeros(rows, 2 * KV_HEADS, SIZE)
    query: dict[str, Tensor] = {}
    if requests is not None:
        query = {
            "query": torch.zeros(requests, HEADS, SIZE),
            "query_positions": torch.zeros(MOST, dtype=torch.int64)[:requests],
        }
    kv_store(
        *fused.split(KV_HEADS, dim=1),
        CACHE,
        SLOTS[start : start + rows],
        rotary_table=TABLE,
        positions=torch.zeros_like(SLOTS)[start : start + rows],
        **query,
    )


def attend(requests: int, rows: int) -> None:
    block = torch.zeros(requests * rows, HEADS, SIZE)
    block_attention(
        block,
        block[:, :KV_HEADS],
        block[:, :KV_HEADS],
        CACHE,
        torch.zeros(MOST, 8, dtype=torch.int32)[:requests],
        torch.ones(requests, dtype=torch.int64),
        torch.zeros(MOST + 1, dtype=torch.int32)[: requests + 1],
        torch.zeros(MOST * rows, dtype=torch.int64)[: requests * rows],
        SIZE**-0.5,
        rows,
        4,
    )


def test_variants_are_told_apart() -> None:
    def both() -> None:
        store(0, 4, None)
        store(0, 4, 2)

    assert len(variants(aot.launches_of(both))) == 2


def test_storing() -> None:
    def with_queries() -> None:
        for requests in BATCHES:
            store(0, 5 * requests, requests)

    def without() -> None:
        for rows in ROWS:
            for start in (0, 5, 80):
                store(start, rows, None)

    assert len(variants(aot.launches_of(with_queries))) == 1
    assert len(variants(aot.launches_of(without))) == 1


def test_attention() -> None:
    """One variant per number of drafts."""

    def all_batches(rows: int) -> None:
        for requests in BATCHES:
            attend(requests, rows)

    for rows in (1, 2, 4, 7, 16):
        assert len(variants(aot.launches_of(functools.partial(all_batches, rows)))) == 1


def test_hook_norm() -> None:
    def normalise() -> None:
        for rows in ROWS:
            states = [torch.zeros(4096, SIZE)[:rows] for _ in range(3)]
            grouped_rms_norm(states, torch.ones(3, SIZE), 1e-6)

    assert len(variants(aot.launches_of(normalise))) == 1
