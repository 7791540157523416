"""Rotary embedding of draft slots, whose positions follow from their anchor's."""

from __future__ import annotations

import torch
from torch import Tensor

from specformer_kernels.rotate_slots import reference

__all__ = ["rotate_slots"]


def rotate_slots(x: Tensor, table: Tensor, anchor_positions: Tensor) -> Tensor:
    """Rotate slot i of every anchor to the position i + 1 behind it.

    Rotation takes element i of the first half of a head with element i of the second, in float32,
    and rounds once. Triton on a GPU where no gradient is wanted, one launch; PyTorch elsewhere.

    Args:
        x: [..., n, heads, head_size] floating point, n slots of each anchor; the last dimension
            contiguous.
        table: [max_position, head_size] float32, contiguous rows: the cosines of a position's
            head_size / 2 angles, then their sines.
        anchor_positions: [...] int64; every position from 1 to n behind them is a row of `table`.

    Returns:
        Like `x`, contiguous.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad):
        from specformer_kernels.rotate_slots import triton_kernel

        return triton_kernel.rotate_slots(x, table, anchor_positions)
    return reference.rotate_slots(x, table, anchor_positions)
