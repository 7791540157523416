"""Writing the step's K and V rows into the paged cache, with rotary embedding on the way."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.kv_store import reference
from specformer_kernels.kv_store.reference import rotate

__all__ = ["kv_store", "rotate"]


def kv_store(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    rotary_table: Tensor | None = None,
    positions: Tensor | None = None,
    query: Tensor | None = None,
    query_positions: Tensor | None = None,
    value_cache: Tensor | None = None,
) -> Tensor | None:
    """Rotate each row's K and write it with its V at the row's slot of the cache, in place.

    The few queries of the step are rotated along. Rotation takes element i of the first half of a
    head with element i of the second, in float32, and rounds once; `key` itself stays as it is.
    Triton on a GPU, one launch in all; PyTorch elsewhere.

    Args:
        key: [T, num_kv_heads, head_size] floating point, last dimension contiguous.
        value: like `key`; the strides may differ.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], key's dtype; K goes to the
            first half of the last dimension, V to the second. Any strides but the last's.
        slot_mapping: [T] int64, block id * block_size + offset; a negative slot skips the row. Two
            rows must not name the same slot.
        rotary_table: [max_position, head_size] float32, contiguous rows: the cosines of a
            position's head_size / 2 angles, then their sines. None: nothing is rotated.
        positions: [T] int64, rows of `rotary_table`, needed with it. Those of skipped rows are not
            looked up.
        query: [A, num_heads, head_size], key's dtype, last dimension contiguous; needs a table.
        query_positions: [A] int64, needed with `query`; every one is looked up.
        value_cache: where V goes if it does not lie beside K. Both caches then are [num_blocks,
            num_kv_heads, block_size, head_size], with equal strides.

    Returns:
        The rotated queries, [A, num_heads, head_size] contiguous; None if there is no `query`.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if key.is_cuda:
        from specformer_kernels.kv_store import triton_kernel

        implementation = triton_kernel.kv_store
    else:
        implementation = reference.kv_store
    return implementation(
        key,
        value,
        kv_cache,
        slot_mapping,
        rotary_table=rotary_table,
        positions=positions,
        query=query,
        query_positions=query_positions,
        value_cache=value_cache,
    )
