"""Laying drafted trees over the rows of a batch, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A row's ancestors and itself are the bits of one word.
MAX_BLOCK_ROWS = 64


class TreeTable(NamedTuple):
    """Drafted trees by state row, n nodes and the root each.

    S state rows and one more, which takes what a captured step writes for the rows that pad it.
    """

    roots: Tensor  # int64 [S + 1], position of the root; -1: no tree
    tokens: Tensor  # int64 [S + 1, n + 1]; -1 at the root and at nodes that are none
    parents: Tensor  # int32 [S + 1, n + 1]; -1 at nodes that are none
    depths: Tensor  # int32 [S + 1, n + 1]
    mask: Tensor  # int64 [S + 1, n + 1]; bit j is set iff node j is the node itself or an ancestor
    is_live: Tensor  # bool [S + 1], whether the tree is in the batch that is being verified
    paths: Tensor  # int32 [S + 1, n + 1], accepted nodes from the root on; -1 beyond


def check_table(table: TreeTable) -> None:
    """Raise ValueError, naming the field, where the table's shapes or dtypes break the contract."""
    shape = table.tokens.shape
    if len(shape) != 2 or not 2 <= shape[1] <= MAX_BLOCK_ROWS:
        raise ValueError(
            f"table.tokens: expected [S + 1, n + 1], n from 1 to {MAX_BLOCK_ROWS - 1}, found "
            f"{list(shape)}"
        )
    wide = {"tokens": torch.int64, "parents": torch.int32, "depths": torch.int32}
    wide |= {"mask": torch.int64, "paths": torch.int32}
    for name, tensor in table._asdict().items():
        dtype = wide.get(name, torch.int64 if name == "roots" else torch.bool)
        check_tensor(f"table.{name}", tensor, dtype, shape if name in wide else shape[:1])


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, least: tuple[int, ...] | torch.Size
) -> None:
    """Raise ValueError unless it is contiguous, of this dtype, and as large in every dimension."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, found {tensor.dtype}")
    is_large = tensor.dim() == len(least) and all(
        size >= wanted for size, wanted in zip(tensor.shape, least, strict=True)
    )
    if not is_large or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of at least {list(least)}, found shape "
            f"{list(tensor.shape)}, strides {tensor.stride()}"
        )


def check_arguments(
    table: TreeTable,
    query_start_loc: Tensor,
    row_start_loc: Tensor,
    idx_mapping: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    row_mask: Tensor,
    context_lens: Tensor,
) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    check_table(table)
    requests = len(idx_mapping)
    check_tensor("query_start_loc", query_start_loc, torch.int32, (requests + 1,))
    check_tensor("row_start_loc", row_start_loc, torch.int32, (requests + 1,))
    check_tensor("idx_mapping", idx_mapping, torch.int64, (requests,))
    check_tensor("seq_lens", seq_lens, torch.int32, (requests,))
    check_tensor("positions", positions, torch.int64, (0,))
    check_tensor("row_mask", row_mask, torch.int64, (len(positions),))
    check_tensor("context_lens", context_lens, torch.int32, (requests,))


def place_trees(
    table: TreeTable,
    query_start_loc: Tensor,
    row_start_loc: Tensor,
    idx_mapping: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    row_mask: Tensor,
    context_lens: Tensor,
) -> None:
    """One request's rows at a time in a [R, 64] table of rows.

    Shapes and dtypes as in `specformer_kernels.place_trees.place_trees`.
    """
    check_arguments(
        table,
        query_start_loc,
        row_start_loc,
        idx_mapping,
        seq_lens,
        positions,
        row_mask,
        context_lens,
    )
    requests, nodes = len(idx_mapping), table.tokens.shape[1]
    first = query_start_loc[:requests].long()
    lengths = query_start_loc[1 : requests + 1].long() - first
    drafts = row_start_loc[1 : requests + 1] - row_start_loc[:requests] - 1
    context_lens[:requests] = seq_lens[:requests] - lengths
    context_lens[requests:] = 0
    if not requests:
        return

    root = positions[first.clamp(max=len(positions) - 1)]
    stands = (table.roots[idx_mapping] == root) & (lengths <= nodes)
    live = (drafts > 0) & (drafts + 1 == lengths) & stands
    table.is_live[idx_mapping] = live
    table.paths[idx_mapping] = -1
    table.paths[idx_mapping, 0] = 0

    local = torch.arange(MAX_BLOCK_ROWS, device=positions.device)
    node = local.clamp(max=nodes - 1)
    bit = torch.ones_like(local) << local
    causal = bit | (bit - 1)
    words = torch.where(live[:, None], table.mask[idx_mapping][:, node], causal)
    moved = root[:, None] + table.depths[idx_mapping][:, node]
    rows = first[:, None] + local
    is_row = (local < lengths[:, None]) & (rows < len(positions))
    row_mask[rows[is_row]] = words[is_row]
    is_moved = is_row & live[:, None]
    positions[rows[is_moved]] = moved[is_moved]
