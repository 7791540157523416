"""Moving K and V rows inside the paged cache in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# A program of the kernel holds all rows of a request at once.
MAX_MOVES = 64


def check_arguments(kv_cache: Tensor, source_slots: Tensor, target_slots: Tensor) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if kv_cache.dim() != 4:
        raise ValueError(
            f"kv_cache: expected [num_blocks, num_kv_heads, block_size, 2 * head_size], "
            f"found {list(kv_cache.shape)}"
        )
    if kv_cache.numel() and kv_cache.stride(-1) != 1:
        raise ValueError(
            f"kv_cache: expected a contiguous last dimension, found stride {kv_cache.stride(-1)}"
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


def kv_compact(kv_cache: Tensor, source_slots: Tensor, target_slots: Tensor) -> None:
    """Gather every source row, then write every target row, in place.

    Shapes and dtypes as in `specformer_kernels.kv_compact.kv_compact`. Reads the slots on the host.
    """
    check_arguments(kv_cache, source_slots, target_slots)
    is_moved = (source_slots >= 0) & (target_slots >= 0)
    source, target = source_slots[is_moved], target_slots[is_moved]
    block_size = kv_cache.shape[2]
    by_slot = kv_cache.transpose(1, 2)  # [num_blocks, block_size, num_kv_heads, 2 * head_size]
    rows = by_slot[source // block_size, source % block_size]  # a copy
    by_slot[target // block_size, target % block_size] = rows
