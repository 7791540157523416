"""Accepted paths through rows and slots: kernel and reference against a loop in Python."""

from __future__ import annotations

import pytest
import torch
from specformer_kernels.place_trees import TreeTable
from specformer_kernels.tree_paths import TreePaths, reference, triton_kernel

from support.trees import STATES, Batch, make_batch, make_table

IMPLEMENTATIONS = {"torch": reference.tree_paths, "triton": triton_kernel.tree_paths}
EACH = pytest.mark.parametrize("name", IMPLEMENTATIONS)
BATCHES = [[(9, 8)] * 4, [(9, 8), (4, 3), (2, 1), (1, 0), (100, 0)], [(64, 63), (64, 63)], []]


def walked(table: TreeTable, batch: Batch, shape: list[tuple[int, int]]) -> torch.Tensor:
    """Walk down every second request's tree, in the table; gives drafts refused by the others."""
    rejected = torch.zeros(len(shape), dtype=torch.int32)
    for request, (length, drafts) in enumerate(shape):
        state = int(batch.idx_mapping[request])
        table.is_live[state] = drafts > 0 and request % 2 == 0
        table.paths[state] = -1
        path = [0]
        while table.is_live[state] and len(path) <= 5:
            parents = table.parents[state, :length].tolist()
            below = [node for node in range(1, length) if parents[node] == path[-1]]
            if not below:
                break
            path.append(below[-1])
        table.paths[state, : len(path)] = torch.tensor(path).int()
        rejected[request] = drafts + 1 - len(path) if table.is_live[state] else drafts // 2
    return rejected


def follow(
    name: str, table: TreeTable, batch: Batch, rejected: torch.Tensor, device: str
) -> TreePaths:
    paths = IMPLEMENTATIONS[name](
        TreeTable(*(tensor.to(device) for tensor in table)),
        batch.query_start_loc.to(device),
        batch.idx_mapping.to(device),
        rejected.to(device),
        batch.slot_mapping.to(device),
    )
    return TreePaths(*(tensor.cpu() for tensor in paths))


@EACH
@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_follows_each_path(shape: list[tuple[int, int]], name: str, kernel_device: str) -> None:
    table, batch = make_table(max([8, *(drafts for _, drafts in shape)])), make_batch(shape)
    rejected = walked(table, batch, shape)
    found = follow(name, table, batch, rejected, kernel_device)

    slots, starts = batch.slot_mapping.tolist(), batch.query_start_loc.tolist()
    assert len(found.row_slots) == len(slots)
    for request, (length, _) in enumerate(shape):
        state, first = int(batch.idx_mapping[request]), starts[request]
        own = slots[first : first + length]
        path = [node for node in table.paths[state].tolist() if node >= 0]
        if not table.is_live[state]:
            assert found.row_slots[first : first + length].tolist() == own
            assert int(found.last_rows[request]) == first + length - 1 - int(rejected[request])
            path = []
        else:
            belongs = dict(zip(path, own, strict=False))
            expected = [belongs.get(row, -1) for row in range(length)]
            assert found.row_slots[first : first + length].tolist() == expected
            assert int(found.last_rows[request]) == first + path[-1]
        rest = [-1] * (table.tokens.shape[1] - len(path))
        assert found.source_slots[request].tolist() == [own[node] for node in path] + rest
        assert found.target_slots[request].tolist() == own[: len(path)] + rest


@EACH
def test_bad_arguments_are_named(name: str) -> None:
    table, batch = make_table(8), make_batch(BATCHES[0])
    rejected = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^num_rejected: expected torch\.int32"):
        follow(name, table, batch, rejected.long(), "cpu")
    wrong = batch._replace(slot_mapping=batch.slot_mapping.repeat(2)[::2])
    with pytest.raises(ValueError, match=r"^slot_mapping: expected a contiguous"):
        follow(name, table, wrong, rejected, "cpu")
    with pytest.raises(ValueError, match=r"^table\.paths: expected"):
        follow(name, table._replace(paths=table.paths[:STATES]), batch, rejected, "cpu")
