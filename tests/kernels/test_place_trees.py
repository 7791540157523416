"""Laying trees over a batch: kernel and reference against a loop in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from specformer_kernels.place_trees import MAX_BLOCK_ROWS, TreeTable, reference, triton_kernel

from support.trees import STATES, Batch, make_batch, make_table

POISON = -77
IMPLEMENTATIONS = {"torch": reference.place_trees, "triton": triton_kernel.place_trees}
EACH = pytest.mark.parametrize("name", IMPLEMENTATIONS)
# Rows and drafts of each request: whole trees, cut ones, one node, prompts, prompts with drafts.
BATCHES = [
    [(9, 8), (9, 8), (9, 8)],
    [(9, 8), (4, 3), (2, 1), (1, 0), (5, 0), (100, 0)],
    [(1, 0)],
    [(12, 3), (80, 2)],
    [],
]


def place(
    name: str, table: TreeTable, batch: Batch, device: str
) -> tuple[TreeTable, dict[str, Any]]:
    """What a call leaves: the table, and the rows' positions, masks and the context lengths."""
    table = TreeTable(*(tensor.clone().to(device) for tensor in table))
    rows = len(batch.positions)
    written = {
        "positions": batch.positions.clone().to(device),
        "row_mask": torch.full((rows,), POISON, device=device),
        "context_lens": torch.full((8,), POISON, dtype=torch.int32, device=device),
    }
    IMPLEMENTATIONS[name if device == "cpu" or name == "triton" else "torch"](
        table,
        batch.query_start_loc.to(device),
        batch.row_start_loc.to(device),
        batch.idx_mapping.to(device),
        batch.seq_lens.to(device),
        **written,
    )
    return table, {key: tensor.cpu().tolist() for key, tensor in written.items()}


@EACH
@pytest.mark.parametrize("nodes", [8, 63])
@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_places_each_request(
    shape: list[tuple[int, int]], nodes: int, name: str, kernel_device: str
) -> None:
    table, batch = make_table(nodes), make_batch(shape)
    for request, state in enumerate(batch.idx_mapping.tolist()):
        if request % 3 != 2:  # every third has drafted nothing, or for another place
            table.roots[state] = batch.positions[batch.query_start_loc[request]]
    placed, written = place(name, table, batch, kernel_device)

    starts, seen = batch.query_start_loc.tolist(), set()
    for request, (length, drafts) in enumerate(shape):
        state, first = int(batch.idx_mapping[request]), starts[request]
        root = int(batch.positions[first])
        is_live = bool(drafts) and length == drafts + 1 and int(table.roots[state]) == root
        seen.add(is_live)
        assert bool(placed.is_live[state]) == is_live
        assert placed.paths[state].tolist() == [0] + [-1] * nodes
        assert written["context_lens"][request] == int(batch.seq_lens[request]) - length
        for local in range(min(length, MAX_BLOCK_ROWS)):
            word, position = written["row_mask"][first + local], written["positions"][first + local]
            if is_live:
                assert word == int(table.mask[state, local])
                assert position == root + int(table.depths[state, local])
            else:
                assert [word >> j & 1 for j in range(64)] == [j <= local for j in range(64)]
                assert position == root + local
    assert written["context_lens"][len(shape) :] == [0] * (8 - len(shape))
    untouched = [s for s in range(STATES + 1) if s not in batch.idx_mapping.tolist()]
    assert torch.equal(placed.paths[untouched].cpu(), table.paths[untouched])
    assert len(shape) < 3 or seen == {True, False}


@EACH
@pytest.mark.parametrize(
    ("field", "change", "named"),
    [
        ("query_start_loc", lambda t: t.long(), "query_start_loc: expected torch.int32"),
        ("row_start_loc", lambda t: t[:1], "row_start_loc: expected a contiguous tensor of at"),
        ("idx_mapping", lambda t: t.int(), "idx_mapping: expected torch.int64"),
        ("seq_lens", lambda t: t[:1], "seq_lens: expected"),
        ("positions", lambda t: t.int(), "positions: expected torch.int64"),
    ],
)
def test_bad_arguments_are_named(
    field: str, change: Callable, named: str, name: str, kernel_device: str
) -> None:
    batch = make_batch(BATCHES[0])
    with pytest.raises(ValueError, match=f"^{named}"):
        place(name, make_table(8), batch._replace(**{field: change(getattr(batch, field))}), "cpu")


def test_bad_tables_are_named() -> None:
    table, batch = make_table(8), make_batch(BATCHES[0])
    wrong = {
        "tokens": table.tokens.repeat(1, 8),
        "parents": table.parents.long(),
        "roots": table.roots[1:],
        "is_live": table.is_live.int(),
    }
    for field, tensor in wrong.items():
        with pytest.raises(ValueError, match=rf"^table\.{field}: expected"):
            place("torch", table._replace(**{field: tensor}), batch, "cpu")
