"""Writing K and V rows into the paged cache in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def check_arguments(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if key.dim() != 3:
        raise ValueError(
            f"key: expected [rows, num_kv_heads, head_size], found shape {list(key.shape)}"
        )
    num_rows, num_kv_heads, head_size = key.shape
    if value.shape != key.shape:
        raise ValueError(
            f"value: expected key's shape {list(key.shape)}, found {list(value.shape)}"
        )
    if (
        kv_cache.dim() != 4
        or kv_cache.shape[1] != num_kv_heads
        or kv_cache.shape[3] != 2 * head_size
    ):
        raise ValueError(
            f"kv_cache: expected [num_blocks, {num_kv_heads}, block_size, {2 * head_size}], "
            f"found {list(kv_cache.shape)}"
        )
    for name, tensor in (("key", key), ("value", value), ("kv_cache", kv_cache)):
        if tensor.dtype != key.dtype:
            raise ValueError(f"{name}: expected key's dtype {key.dtype}, found {tensor.dtype}")
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, found stride {tensor.stride(-1)}"
            )
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] != num_rows:
        raise ValueError(
            f"slot_mapping: expected shape [{num_rows}], found {list(slot_mapping.shape)}"
        )
    if slot_mapping.dtype != torch.int64:
        raise ValueError(f"slot_mapping: expected torch.int64, found {slot_mapping.dtype}")


def kv_store(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each row's K and V at its slot, in place.

    Shapes and dtypes as in `specformer_kernels.kv_store.kv_store`. Reads `slot_mapping` on the
    host.
    """
    check_arguments(key, value, kv_cache, slot_mapping)
    rows = torch.cat((key, value), dim=-1)
    is_stored = slot_mapping >= 0
    if not is_stored.all():
        rows, slot_mapping = rows[is_stored], slot_mapping[is_stored]
    block_size = kv_cache.shape[2]
    kv_cache.transpose(1, 2)[slot_mapping // block_size, slot_mapping % block_size] = rows
