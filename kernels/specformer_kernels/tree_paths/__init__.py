"""What a verified tree leaves behind: rows to keep, slots to move, and the row to draft from."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.place_trees.reference import TreeTable
from specformer_kernels.tree_paths import reference
from specformer_kernels.tree_paths.reference import TreePaths

__all__ = ["TreePaths", "tree_paths"]


def tree_paths(
    table: TreeTable,
    query_start_loc: Tensor,
    idx_mapping: Tensor,
    num_rejected: Tensor,
    slot_mapping: Tensor,
) -> TreePaths:
    """Follow the accepted path of every tree through the rows and slots of its batch.

    The i-th accepted node's K and V belong into the i-th slot of its request's rows. Requests
    without a tree in the batch keep what they have. Triton on a GPU, no host sync; PyTorch
    elsewhere.

    Args:
        table: the trees by state row, with `is_live` and `paths` of this batch.
        query_start_loc: int32 [R + 1 or more], first row of each request, then the rows of all.
        idx_mapping: int64 [R], state row of each request.
        num_rejected: int32 [R], drafts of each request that were refused.
        slot_mapping: int64 [T], slots of the rows in one KV-cache group.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if slot_mapping.is_cuda:
        from specformer_kernels.tree_paths import triton_kernel

        implementation = triton_kernel.tree_paths
    else:
        implementation = reference.tree_paths
    return implementation(table, query_start_loc, idx_mapping, num_rejected, slot_mapping)
