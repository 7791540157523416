"""Following accepted paths through rows and slots, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specformer_kernels.place_trees.reference import TreeTable, check_table, check_tensor


class TreePaths(NamedTuple):
    """Where the accepted nodes of R requests lie, and where they belong; n nodes at most."""

    source_slots: Tensor  # int64 [R, n + 1]; -1: nothing to move
    target_slots: Tensor  # int64 [R, n + 1]; -1: nothing to move
    row_slots: Tensor  # int64 [T], the slot that each row belongs into; -1 for refused nodes
    last_rows: Tensor  # int64 [R], row of each request's last accepted token


def check_arguments(
    table: TreeTable,
    query_start_loc: Tensor,
    idx_mapping: Tensor,
    num_rejected: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    check_table(table)
    requests = len(idx_mapping)
    check_tensor("query_start_loc", query_start_loc, torch.int32, (requests + 1,))
    check_tensor("idx_mapping", idx_mapping, torch.int64, (requests,))
    check_tensor("num_rejected", num_rejected, torch.int32, (requests,))
    check_tensor("slot_mapping", slot_mapping, torch.int64, (0,))


def tree_paths(
    table: TreeTable,
    query_start_loc: Tensor,
    idx_mapping: Tensor,
    num_rejected: Tensor,
    slot_mapping: Tensor,
) -> TreePaths:
    """Shapes and dtypes as in `specformer_kernels.tree_paths.tree_paths`."""
    check_arguments(table, query_start_loc, idx_mapping, num_rejected, slot_mapping)
    requests = len(idx_mapping)
    first = query_start_loc[:requests].long()
    lengths = query_start_loc[1 : requests + 1].long() - first
    paths, live = table.paths[idx_mapping].long(), table.is_live[idx_mapping]
    rank = torch.arange(paths.shape[1], device=paths.device)
    is_kept = live[:, None] & (paths >= 0)

    targets, sources = first[:, None] + rank, first[:, None] + paths  # rows; past a request: unused
    row_slots = slot_mapping.clone()
    row_slots[targets[live[:, None] & (rank < lengths[:, None])]] = -1
    row_slots[sources[is_kept]] = slot_mapping[targets[is_kept]]
    source_slots, target_slots = torch.full((2, *paths.shape), -1, device=paths.device)
    source_slots[is_kept] = slot_mapping[sources[is_kept]]
    target_slots[is_kept] = slot_mapping[targets[is_kept]]
    end = sources.gather(1, (is_kept.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
    last_rows = torch.where(live, end, first + lengths - 1 - num_rejected)
    return TreePaths(source_slots, target_slots, row_slots, last_rows)
