"""Rotary embedding of draft slots in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from specformer_kernels.kv_store.reference import rotate


def check_arguments(x: Tensor, table: Tensor, anchor_positions: Tensor) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if x.dim() < 3 or x.shape[-1] % 2:
        raise ValueError(
            f"x: expected [..., slots, heads, head_size] and an even head_size, found shape "
            f"{list(x.shape)}"
        )
    if table.dim() != 2 or table.shape[1] != x.shape[-1] or table.dtype != torch.float32:
        raise ValueError(
            f"table: expected float32 [positions, {x.shape[-1]}], found {table.dtype} "
            f"{list(table.shape)}"
        )
    for name, tensor in (("x", x), ("table", table)):
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, found stride {tensor.stride(-1)}"
            )
    if anchor_positions.shape != x.shape[:-3]:
        raise ValueError(
            f"anchor_positions: expected shape {list(x.shape[:-3])}, found "
            f"{list(anchor_positions.shape)}"
        )
    if anchor_positions.dtype != torch.int64:
        raise ValueError(f"anchor_positions: expected torch.int64, found {anchor_positions.dtype}")


def rotate_slots(x: Tensor, table: Tensor, anchor_positions: Tensor) -> Tensor:
    """Rotate slot i to the position i + 1 behind its anchor; differentiable.

    Shapes and dtypes as in `specformer_kernels.rotate_slots.rotate_slots`.
    """
    check_arguments(x, table, anchor_positions)
    offsets = torch.arange(1, x.shape[-3] + 1, device=x.device)
    return rotate(x, table, anchor_positions.unsqueeze(-1) + offsets)
