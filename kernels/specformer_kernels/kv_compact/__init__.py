"""Moving accepted K and V rows to consecutive slots of the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specformer_kernels.kv_compact import reference
from specformer_kernels.kv_compact.reference import cache_addresses

__all__ = ["cache_addresses", "kv_compact"]


def kv_compact(
    kv_caches: Sequence[Tensor],
    source_slots: Tensor,
    target_slots: Tensor,
    addresses: Tensor | None = None,
) -> None:
    """Copy K and V of some layers from slot to slot inside each request, in place, all at once.

    Every source is read before any target of the request is written, so that sources and targets
    may overlap in any way. Triton on a GPU, else PyTorch.

    Args:
        kv_caches: the layers' caches, alike in shape, strides and dtype: [num_blocks, num_kv_heads,
            block_size, 2 * head_size], any dtype, any strides but the last's.
        source_slots: [R, L] int64, contiguous, L up to 64; block id * block_size + offset. A
            negative slot skips the entry.
        target_slots: like `source_slots`. Two entries must not name the same target, and no request
            may write a slot that another one reads or writes.
        addresses: what `cache_addresses` makes of the caches. Without them a call makes them, and
            cannot be captured in a CUDA graph.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if source_slots.is_cuda:
        from specformer_kernels.kv_compact import triton_kernel

        triton_kernel.kv_compact(kv_caches, source_slots, target_slots, addresses)
    else:
        reference.kv_compact(kv_caches, source_slots, target_slots, addresses)
