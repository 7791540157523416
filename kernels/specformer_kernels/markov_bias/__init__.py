"""The Markov term of a slot's logits: look-up, gates, low-rank product and sum in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from specformer_kernels.markov_bias import reference
from specformer_kernels.markov_bias.reference import FEW_ROWS

__all__ = ["FEW_ROWS", "markov_bias"]


def markov_bias(
    logits: Tensor,
    previous: Tensor,
    embed: Tensor,
    lm_head: Tensor,
    gates: Tensor | None = None,
) -> Tensor:
    """`logits + (embed[previous] * gates) @ lm_head.T`: what the tokens one slot earlier add.

    Triton on a GPU where no gradient is wanted, one launch: the product is summed in float32, added
    to the logit and rounded once. PyTorch elsewhere, which rounds the product as well.

    Args:
        logits: [..., N] floating point; the last dimension contiguous, rows at any stride.
        previous: [...] int32 or int64, rows of `embed`.
        embed: [V, rank] floating point, contiguous.
        lm_head: [N, rank] in the dtype of `embed`, contiguous.
        gates: [..., rank] in the dtype of `embed`, the last dimension contiguous. None: 1.

    Returns:
        [..., N] in the dtype of `logits`, contiguous.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    tensors = (logits, embed, lm_head, gates)
    wants_gradient = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if logits.is_cuda and not (torch.is_grad_enabled() and wants_gradient):
        from specformer_kernels.markov_bias import triton_kernel

        return triton_kernel.markov_bias(logits, previous, embed, lm_head, gates)
    return reference.markov_bias(logits, previous, embed, lm_head, gates)
