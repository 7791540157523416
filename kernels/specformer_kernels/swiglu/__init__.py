"""The gate of a SwiGLU layer: the activation and the product in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from specformer_kernels.swiglu import reference

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of both halves of each row.

    Triton on a GPU where no gradient is wanted, computed in float32 and rounded once; PyTorch
    elsewhere.

    Args:
        gate_up: [..., 2 * I] floating point: gate, then up; the last dimension contiguous.

    Returns:
        [..., I] in the dtype of `gate_up`, contiguous.

    Raises:
        ValueError: the shape breaks the contract; the message names the argument.
    """
    if gate_up.is_cuda and not (torch.is_grad_enabled() and gate_up.requires_grad):
        from specformer_kernels.swiglu import triton_kernel

        return triton_kernel.swiglu(gate_up)
    return reference.swiglu(gate_up)
