"""RMSNorm of several hidden states, each by itself, side by side: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_arguments(hidden_states: Sequence[Tensor], weight: Tensor) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if not hidden_states:
        raise ValueError("hidden_states: expected at least one tensor, found none")
    first = hidden_states[0]
    if first.dim() == 0:
        raise ValueError("hidden_states[0]: expected [..., hidden_size], found a scalar")
    for index, hidden in enumerate(hidden_states):
        if hidden.shape != first.shape or hidden.dtype != first.dtype:
            raise ValueError(
                f"hidden_states[{index}]: expected shape {list(first.shape)} and {first.dtype} "
                f"like hidden_states[0], found {list(hidden.shape)} and {hidden.dtype}"
            )
    expected = (len(hidden_states), first.shape[-1])
    if weight.shape != expected:
        raise ValueError(f"weight: expected shape {list(expected)}, found {list(weight.shape)}")


def grouped_rms_norm(hidden_states: Sequence[Tensor], weight: Tensor, eps: float) -> Tensor:
    """Normalise each tensor over its last dimension, scale it by its own weights, join them.

    Shapes and dtypes as in `specformer_kernels.grouped_rms_norm.grouped_rms_norm`. Computes in
    float32, or in float64 for float64 inputs; differentiable.
    """
    check_arguments(hidden_states, weight)
    hidden = torch.stack(tuple(hidden_states), dim=-2)  # [..., G, H]
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normed = F.rms_norm(wide, wide.shape[-1:], eps=eps) * weight
    return normed.to(hidden.dtype).flatten(-2)
