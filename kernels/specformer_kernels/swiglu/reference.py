"""The gate of a SwiGLU layer in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def check_arguments(gate_up: Tensor) -> None:
    """Raise ValueError, naming the argument, where the shape breaks the contract."""
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up: expected [..., an even number], found shape {list(gate_up.shape)}"
        )
    if gate_up.numel() and gate_up.stride(-1) != 1:
        raise ValueError(
            f"gate_up: expected a contiguous last dimension, found stride {gate_up.stride(-1)}"
        )


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`; differentiable. Shapes as in `specformer_kernels.swiglu.swiglu`."""
    check_arguments(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
