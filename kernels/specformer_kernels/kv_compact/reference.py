"""Moving K and V rows inside the paged cache in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A program of the kernel holds all rows of a request at once.
MAX_MOVES = 64


def cache_addresses(kv_caches: Sequence[Tensor]) -> Tensor:
    """Where the caches lie, int64 [L] on their device. Good while their memory is theirs."""
    pointers = [cache.data_ptr() for cache in kv_caches]
    return torch.tensor(pointers, dtype=torch.int64, device=kv_caches[0].device)


def check_arguments(
    kv_caches: Sequence[Tensor],
    source_slots: Tensor,
    target_slots: Tensor,
    addresses: Tensor | None = None,
) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if not kv_caches:
        raise ValueError("kv_caches: expected at least one")
    first = kv_caches[0]
    if first.dim() != 4:
        raise ValueError(
            f"kv_caches: expected [num_blocks, num_kv_heads, block_size, 2 * head_size], "
            f"found {list(first.shape)}"
        )
    if first.numel() and first.stride(-1) != 1:
        raise ValueError(
            f"kv_caches: expected a contiguous last dimension, found stride {first.stride(-1)}"
        )
    for cache in kv_caches[1:]:
        same = (cache.shape, cache.stride(), cache.dtype)
        if same != (first.shape, first.stride(), first.dtype):
            raise ValueError(
                f"kv_caches: expected all like the first, {list(first.shape)} {first.dtype} with "
                f"strides {first.stride()}, found {list(cache.shape)} {cache.dtype} with "
                f"{cache.stride()}"
            )
    if addresses is not None and (addresses.dtype, tuple(addresses.shape)) != (
        torch.int64,
        (len(kv_caches),),
    ):
        raise ValueError(
            f"addresses: expected int64 [{len(kv_caches)}], found {addresses.dtype} "
            f"{list(addresses.shape)}"
        )
    if source_slots.dim() != 2 or source_slots.shape[1] > MAX_MOVES:
        raise ValueError(
            f"source_slots: expected shape [R, L], L up to {MAX_MOVES}, "
            f"found {list(source_slots.shape)}"
        )
    if target_slots.shape != source_slots.shape:
        raise ValueError(
            f"target_slots: expected source_slots' shape {list(source_slots.shape)}, "
            f"found {list(target_slots.shape)}"
        )
    for name, slots in (("source_slots", source_slots), ("target_slots", target_slots)):
        if slots.dtype != torch.int64:
            raise ValueError(f"{name}: expected torch.int64, found {slots.dtype}")
        if not slots.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, found {slots.stride()}")


def kv_compact(
    kv_caches: Sequence[Tensor],
    source_slots: Tensor,
    target_slots: Tensor,
    addresses: Tensor | None = None,
) -> None:
    """Gather every source row, then write every target row, layer by layer, in place.

    Shapes and dtypes as in `specformer_kernels.kv_compact.kv_compact`. Reads the slots on the host.
    """
    check_arguments(kv_caches, source_slots, target_slots, addresses)
    is_moved = (source_slots >= 0) & (target_slots >= 0)
    source, target = source_slots[is_moved], target_slots[is_moved]
    block_size = kv_caches[0].shape[2]
    for cache in kv_caches:
        by_slot = cache.transpose(1, 2)  # [num_blocks, block_size, num_kv_heads, 2 * head_size]
        rows = by_slot[source // block_size, source % block_size]  # a copy
        by_slot[target // block_size, target % block_size] = rows
