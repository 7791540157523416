"""Following accepted paths through rows and slots, in Triton. Load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.place_trees.reference import TreeTable
from specformer_kernels.tree_paths.reference import TreePaths, check_arguments


# Counts change from step to step, and a specialisation of each would compile while serving.
@triton.jit(
    do_not_specialize=["nodes"],
    do_not_specialize_on_alignment=[
        "query_start_loc_ptr", "idx_mapping_ptr", "num_rejected_ptr", "slot_mapping_ptr",
        "source_slots_ptr", "target_slots_ptr", "row_slots_ptr", "last_rows_ptr",
    ],
)  # fmt: skip
def _tree_paths_kernel(
    source_slots_ptr,  # int64 [R, nodes]
    target_slots_ptr,  # int64 [R, nodes]
    row_slots_ptr,  # int64 [T], a copy of the slot mapping
    last_rows_ptr,  # int64 [R]
    is_live_ptr,  # bool [S + 1]
    paths_ptr,  # int32 [S + 1, nodes]
    query_start_loc_ptr,  # int32 [R + 1]
    idx_mapping_ptr,  # int64 [R]
    num_rejected_ptr,  # int32 [R]
    slot_mapping_ptr,  # int64 [T]
    nodes,  # n + 1
    BLOCK: tl.constexpr,  # >= nodes
):
    request = tl.program_id(0).to(tl.int64)
    first = tl.load(query_start_loc_ptr + request).to(tl.int64)
    end = tl.load(query_start_loc_ptr + request + 1).to(tl.int64)
    state = tl.load(idx_mapping_ptr + request)
    live = tl.load(is_live_ptr + state) != 0

    b_rank = tl.arange(0, BLOCK)
    is_node = b_rank < nodes
    rows = tl.where(live, end - first, 0)
    b_path = tl.load(paths_ptr + state * nodes + b_rank, mask=b_rank < rows, other=-1)
    is_kept = b_path >= 0
    b_source = tl.load(slot_mapping_ptr + first + b_path, mask=is_kept, other=-1)
    b_target = tl.load(slot_mapping_ptr + first + b_rank, mask=is_kept, other=-1)
    b_out = request * nodes + b_rank
    tl.store(source_slots_ptr + b_out, b_source, mask=is_node)
    tl.store(target_slots_ptr + b_out, b_target, mask=is_node)

    # Row j takes the slot of the rank at which the path passes it; a slot is at least 0.
    passes = (b_path[None, :] == b_rank[:, None]) & is_kept[None, :]  # [row, rank]
    b_slot = tl.max(tl.where(passes, b_target[None, :], -1), 1)
    tl.store(row_slots_ptr + first + b_rank, b_slot, mask=b_rank < rows)

    # A node comes after its parent, so the last one of a path is the largest.
    last = first + tl.max(b_path, 0)
    without = end - 1 - tl.load(num_rejected_ptr + request)
    tl.store(last_rows_ptr + request, tl.where(live, last, without))


def tree_paths(
    table: TreeTable,
    query_start_loc: Tensor,
    idx_mapping: Tensor,
    num_rejected: Tensor,
    slot_mapping: Tensor,
) -> TreePaths:
    """Launch the kernel: one program per request, after a copy of the slots. No host sync.

    Shapes and dtypes as in `specformer_kernels.tree_paths.tree_paths`.
    """
    check_arguments(table, query_start_loc, idx_mapping, num_rejected, slot_mapping)
    requests, nodes = len(idx_mapping), table.tokens.shape[1]
    slots = torch.empty((2, requests, nodes), dtype=torch.int64, device=slot_mapping.device)
    paths = TreePaths(slots[0], slots[1], slot_mapping.clone(), slots.new_empty(requests))
    if requests:
        with torch.cuda.device_of(slot_mapping):
            _tree_paths_kernel[(requests,)](
                *paths,
                table.is_live,
                table.paths,
                query_start_loc,
                idx_mapping,
                num_rejected,
                slot_mapping,
                nodes,
                BLOCK=triton.next_power_of_2(nodes),
                num_warps=1,
            )
    return paths
