"""The rows of drafted trees in a batch to be verified: positions, masks, and what is there."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.place_trees import reference
from specformer_kernels.place_trees.reference import MAX_BLOCK_ROWS, TreeTable

__all__ = ["MAX_BLOCK_ROWS", "TreeTable", "place_trees"]


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
    """Lay the requests' trees over the rows of a batch, in place.

    A request's tree is in the batch if some of its nodes are drafts of this step and its root
    stands where it was drafted from. Its nodes may be cut to the first few, which are a tree again.
    Then the rows' positions become the root's plus the depth. All other rows keep their positions
    and see the rows before them. Triton on a GPU, one launch and no host sync; PyTorch elsewhere.

    Args:
        table: the trees by state row. Written: `is_live` of the batch's requests, whether their
            tree is in the batch, and `paths`, which becomes the root alone.
        query_start_loc: int32 [R + 1 or more], first row of each request, then the rows of all.
        row_start_loc: int32 [R + 1]; a request has one row to sample from more than it has drafts,
            `row_start_loc[r + 1] - row_start_loc[r]` in all, the last of its rows.
        idx_mapping: int64 [R], state row of each request.
        seq_lens: int32 [R or more], tokens of each request, those of this step counted.
        positions: int64 [T], of the batch's rows. Written.
        row_mask: int64 [T], written for the first 64 rows of each request: bit j is set iff the row
            attends to row j of its request.
        context_lens: int32 [most requests], written: tokens before this step; 0 past the batch.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if positions.is_cuda:
        from specformer_kernels.place_trees import triton_kernel

        implementation = triton_kernel.place_trees
    else:
        implementation = reference.place_trees
    implementation(
        table,
        query_start_loc,
        row_start_loc,
        idx_mapping,
        seq_lens,
        positions,
        row_mask,
        context_lens,
    )
