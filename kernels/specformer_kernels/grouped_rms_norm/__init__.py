"""RMSNorm of several hidden states, each with its own statistics and weights, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specformer_kernels.grouped_rms_norm import reference

__all__ = ["grouped_rms_norm"]


def grouped_rms_norm(hidden_states: Sequence[Tensor], weight: Tensor, eps: float) -> Tensor:
    """RMS-normalise G hidden states separately and lay them side by side.

    Statistics in float32. Triton on a GPU, forward and backward; PyTorch elsewhere.

    Args:
        hidden_states: G tensors [..., H] of one shape and dtype; they need not share memory.
        weight: [G, H] floating point, one scale vector per group.
        eps: added to the mean square.

    Returns:
        [..., G * H] in the dtype of `hidden_states`; group g at columns g * H to (g + 1) * H.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if weight.is_cuda:
        from specformer_kernels.grouped_rms_norm import triton_kernel

        return triton_kernel.grouped_rms_norm(hidden_states, weight, eps)
    return reference.grouped_rms_norm(hidden_states, weight, eps)
