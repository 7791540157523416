"""Laying drafted trees over the rows of a batch, in Triton. Imports triton: load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.place_trees.reference import MAX_BLOCK_ROWS, TreeTable, check_arguments


# Counts change from step to step, and a specialisation of each would compile while serving.
@triton.jit(
    do_not_specialize=["num_reqs", "num_rows", "nodes"],
    do_not_specialize_on_alignment=[
        "query_start_loc_ptr", "row_start_loc_ptr", "idx_mapping_ptr", "seq_lens_ptr",
        "positions_ptr",
    ],
)  # fmt: skip
def _place_trees_kernel(
    roots_ptr,  # int64 [S + 1]
    depths_ptr,  # int32 [S + 1, nodes]
    mask_ptr,  # int64 [S + 1, nodes]
    is_live_ptr,  # bool [S + 1]
    paths_ptr,  # int32 [S + 1, nodes]
    query_start_loc_ptr,  # int32 [num_reqs + 1]
    row_start_loc_ptr,  # int32 [num_reqs + 1]
    idx_mapping_ptr,  # int64 [num_reqs]
    seq_lens_ptr,  # int32 [num_reqs]
    positions_ptr,  # int64 [num_rows]
    row_mask_ptr,  # int64 [num_rows]
    context_lens_ptr,  # int32 [most requests]
    num_reqs,
    num_rows,
    nodes,  # n + 1
    BLOCK: tl.constexpr,  # rows of a request that can hold a tree
):
    request = tl.program_id(0)
    if request >= num_reqs:
        tl.store(context_lens_ptr + request, 0)
        return
    first = tl.load(query_start_loc_ptr + request).to(tl.int64)
    length = tl.load(query_start_loc_ptr + request + 1) - first
    sampled = tl.load(row_start_loc_ptr + request + 1) - tl.load(row_start_loc_ptr + request)
    tl.store(context_lens_ptr + request, tl.load(seq_lens_ptr + request) - length.to(tl.int32))

    state = tl.load(idx_mapping_ptr + request)
    root = tl.load(positions_ptr + first, mask=first < num_rows, other=-2)
    stands = (tl.load(roots_ptr + state) == root) & (length <= nodes)
    live = (sampled > 1) & (sampled == length) & stands  # as many nodes as rows at most
    tl.store(is_live_ptr + state, live)

    b_local = tl.arange(0, BLOCK)
    is_node = b_local < nodes
    b_at = state * nodes + b_local
    tl.store(paths_ptr + b_at, tl.where(b_local == 0, 0, -1), mask=is_node)
    b_bit = tl.full([BLOCK], 1, tl.int64) << b_local.to(tl.int64)
    b_tree = tl.load(mask_ptr + b_at, mask=is_node, other=0)
    b_word = tl.where(live, b_tree, b_bit | (b_bit - 1))
    b_row = first + b_local
    is_row = (b_local < length) & (b_row < num_rows)
    tl.store(row_mask_ptr + b_row, b_word, mask=is_row)
    b_depth = tl.load(depths_ptr + b_at, mask=is_node, other=0)
    is_moved = is_row & (b_local < tl.where(live, length, 0))
    tl.store(positions_ptr + b_row, root + b_depth, mask=is_moved)


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
    """Launch the kernel: one program per request that `context_lens` has room for. No host sync.

    Arguments as in `specformer_kernels.place_trees.place_trees`.
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
    with torch.cuda.device_of(positions):
        _place_trees_kernel[(len(context_lens),)](
            table.roots,
            table.depths,
            table.mask,
            table.is_live,
            table.paths,
            query_start_loc,
            row_start_loc,
            idx_mapping,
            seq_lens,
            positions,
            row_mask,
            context_lens,
            len(idx_mapping),
            len(positions),
            table.tokens.shape[1],
            BLOCK=MAX_BLOCK_ROWS,
            num_warps=1,
        )
