"""Writing the step's K and V rows into the paged cache."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.kv_store import reference

__all__ = ["kv_store"]


def kv_store(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each row's K and V at its slot of the cache, in place. Triton on a GPU, else PyTorch.

    Args:
        key: [T, num_kv_heads, head_size], last dimension contiguous.
        value: like `key`; the strides may differ.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], key's dtype; K goes to the
            first half of the last dimension, V to the second. Any strides but the last's.
        slot_mapping: [T] int64, block id * block_size + offset; a negative slot skips the row. Two
            rows must not name the same slot.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if key.is_cuda:
        from specformer_kernels.kv_store import triton_kernel

        triton_kernel.kv_store(key, value, kv_cache, slot_mapping)
    else:
        reference.kv_store(key, value, kv_cache, slot_mapping)
