"""Serving compiles nothing: a kernel's variants do not depend on a step's requests and rows.

Triton compiles a variant per class of an integer (1, a multiple of 16, other) and of a pointer
(aligned to 16 bytes or not), unless it is told not to look.
"""

from __future__ import annotations

import functools

import aot
import pytest
import torch
from specformer_kernels.block_attention.launch import block_attention
from specformer_kernels.draft_inputs import DraftBuffers, StepInputs
from specformer_kernels.draft_inputs.triton_kernel import draft_inputs
from specformer_kernels.grouped_rms_norm.triton_kernel import grouped_rms_norm
from specformer_kernels.kv_compact import cache_addresses
from specformer_kernels.kv_compact.triton_kernel import kv_compact
from specformer_kernels.kv_store.triton_kernel import kv_store
from specformer_kernels.markov_bias.triton_kernel import markov_bias
from specformer_kernels.place_trees.triton_kernel import place_trees
from specformer_kernels.rotate_slots.triton_kernel import rotate_slots
from specformer_kernels.select_tree.triton_kernel import extend_beam, select_tree
from specformer_kernels.swiglu.triton_kernel import swiglu
from specformer_kernels.tree_candidates.triton_kernel import tree_candidates
from specformer_kernels.tree_paths.triton_kernel import tree_paths
from specformer_kernels.verify.launch import follow
from torch import Tensor

from support.trees import make_table
from support.variants import variant

HEADS, KV_HEADS, SIZE, PAGE, MOST = 8, 2, 64, 16, 256
CACHE = torch.zeros(4, KV_HEADS, PAGE, 2 * SIZE)
SLOTS = torch.full((4096,), -1)
TABLE = torch.zeros(512, SIZE)
# Requests of a batch, and rows of a prefill, of every class that Triton tells apart and more.
BATCHES = (*range(1, 35), 48, 63, 64, 100, 128, 255, 256)
ROWS = (*range(1, 40), 63, 64, 65, 511, 512, 1000, 2047, 2048)


def variants(launches: list[aot.Launch]) -> set[str]:
    """What Triton looks a compiled kernel up by."""
    return {variant(launch.kernel, launch.args, launch.kwargs) for launch in launches}


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
        pages_per_block=4,
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


def test_slots() -> None:
    """One variant per number of drafts, which tell strides."""

    def all_batches(slots: int) -> None:
        for requests in BATCHES:
            projected = torch.zeros(requests, slots, HEADS + 2 * KV_HEADS, SIZE)
            anchors = torch.zeros(MOST, dtype=torch.int64)[:requests]
            rotate_slots(projected[:, :, : HEADS + KV_HEADS], TABLE, anchors)
            swiglu(torch.zeros(requests, slots, 96))

    for slots in (1, 2, 4, 7, 16):
        launches = aot.launches_of(functools.partial(all_batches, slots))
        assert len(variants(launches)) == 2  # of two kernels


@pytest.mark.parametrize("scored", [96, 99])
@pytest.mark.parametrize("is_gated", [True, False], ids=["gates", "no gates"])
def test_markov_term(is_gated: bool, scored: int) -> None:
    """One variant for few requests and one for many, whatever the slot.

    Unless the number of tokens is odd: slots' logits are then aligned or not.
    """
    rank, half = 64, torch.bfloat16
    tables = torch.zeros(scored, rank, dtype=half), torch.zeros(scored, rank, dtype=half)
    tokens = torch.zeros(MOST + 1, dtype=torch.int64)

    def all_batches() -> None:
        for requests in BATCHES:
            logits = torch.zeros(requests, 4, scored, dtype=half)
            gates = torch.zeros(requests, 4, rank, dtype=half)
            for slot in range(4):
                previous = tokens[slot % 2 :][:requests]  # somewhere in a larger tensor
                gate = gates[:, slot] if is_gated else None
                markov_bias(logits[:, slot], previous, *tables, gate)

    assert len(variants(aot.launches_of(all_batches))) == 2 * (1 + scored % 2)


def test_trees() -> None:
    """As `vllm_specformer.candidates` calls them: the first slot has one row and no paths."""
    floats, words = torch.zeros(MOST), torch.zeros(MOST, dtype=torch.int64)

    def all_batches(slots: int) -> None:
        for requests in BATCHES:
            logits = torch.zeros(requests, slots, 96)
            positions, paths = torch.zeros(slots, requests, dtype=torch.int64), None
            for slot in range(slots):
                found = tree_candidates(
                    logits[:, slot],
                    torch.zeros(requests, 4 if slot else 1, 96),
                    8,
                    temperature=floats[:requests],
                    seeds=words[:requests],
                    positions=positions[slot],
                    chains=torch.zeros(MOST, dtype=torch.bool)[:requests],
                )
                lists = [tensor.expand(-1, 4, -1) for tensor in reversed(found)]
                paths = extend_beam(*lists, paths, 4).paths
            all_lists = [torch.stack([tensor] * slots, 1) for tensor in lists]
            select_tree(*all_lists, words.new_zeros(requests, slots, 4), 16)

    for slots in (2, 4, 7):
        launches = aot.launches_of(functools.partial(all_batches, slots))
        assert len(variants(launches)) == 2 + 2 + 2 + 1


@pytest.mark.parametrize("nodes", [2, 8, 15, 16, 63])
def test_verified_trees(nodes: int) -> None:
    """As `vllm_specformer.engine.candidates` calls them, with one variant per size of tree."""
    table = make_table(nodes)
    integers = torch.zeros(MOST * (nodes + 2), dtype=torch.int64)
    counts, row_mask = integers.int(), integers.clone()
    context_lens = torch.zeros(MOST, dtype=torch.int32)
    caches = [CACHE.clone() for _ in range(3)]
    addresses = cache_addresses(caches)

    def all_batches() -> None:
        for requests in BATCHES:
            for start in (0, 1):  # the batch's tensors lie somewhere in larger ones
                rows = integers[start:][: requests * (nodes + 1)]
                of_requests, states = counts[start:], integers[start:][:requests]
                place_trees(
                    table,
                    of_requests,
                    of_requests,
                    states,
                    of_requests,
                    rows,
                    row_mask,
                    context_lens,
                )
                paths = tree_paths(table, of_requests, states, of_requests, rows)
                kv_compact(caches, paths.source_slots, paths.target_slots, addresses)
            tokens = torch.zeros_like(rows)
            starts = torch.zeros(requests + 1, dtype=torch.int32)
            follow(tokens, tokens, starts, nodes + 1, tokens.int())

    assert len(variants(aot.launches_of(all_batches))) == 4  # of four kernels


@pytest.mark.parametrize("walked", [False, True], ids=["chains", "trees"])
def test_inputs(walked: bool) -> None:
    integers = torch.zeros(4096, dtype=torch.int64)
    counts = integers.int()
    buffers = DraftBuffers(
        *(integers[:2048] for _ in range(2)),
        *(integers[:MOST] for _ in range(4)),
        *(integers[: 4 * MOST] for _ in range(2)),
        integers[:MOST],
        torch.zeros(MOST),
        integers[:MOST],
    )

    def all_steps() -> None:
        for place, rows in enumerate(ROWS):
            # The batch's tensors lie somewhere in larger ones.
            requests, start = min(MOST, rows), place % 5
            of_rows, of_requests = integers[start:], counts[start:]
            step = StepInputs(
                query_start_loc=of_requests,
                positions=of_rows,
                slot_mapping=of_rows,
                idx_mapping=of_requests,
                num_sampled=of_requests,
                num_rejected=of_requests,
                last_sampled=integers,
                next_prefill_tokens=counts,
                temperature=torch.zeros(MOST),
                seeds=integers,
                last_rows=of_rows if walked else None,
            )
            draft_inputs(step, buffers, requests, rows)

    assert len(variants(aot.launches_of(all_steps))) == 1
