"""The Markov term of a slot's logits in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 16  # more of them run in larger tiles, another variant of the kernel


def check_arguments(
    logits: Tensor, previous: Tensor, embed: Tensor, lm_head: Tensor, gates: Tensor | None
) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if logits.dim() < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected floating point [..., N], found {logits.dtype} {list(logits.shape)}"
        )
    if embed.dim() != 2 or 0 in embed.shape or not embed.is_floating_point():
        raise ValueError(
            f"embed: expected floating point [V, rank], V and rank above 0, found {embed.dtype} "
            f"{list(embed.shape)}"
        )
    leading, scored, rank = logits.shape[:-1], logits.shape[-1], embed.shape[1]
    if previous.shape != leading or previous.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"previous: expected int32 or int64 {list(leading)}, found {previous.dtype} "
            f"{list(previous.shape)}"
        )
    for name, tensor, shape in (
        ("lm_head", lm_head, (scored, rank)),
        ("gates", gates, (*leading, rank)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != embed.dtype):
            raise ValueError(
                f"{name}: expected {embed.dtype} {list(shape)}, found {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    for name, tensor in (("embed", embed), ("lm_head", lm_head)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, found {tensor.stride()}")
    for name, tensor in (("logits", logits), ("gates", gates)):
        if tensor is not None and tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, found stride {tensor.stride(-1)}"
            )


def markov_bias(
    logits: Tensor,
    previous: Tensor,
    embed: Tensor,
    lm_head: Tensor,
    gates: Tensor | None = None,
) -> Tensor:
    """Logits with the term of the tokens one slot earlier; differentiable.

    Shapes and dtypes as in `specformer_kernels.markov_bias.markov_bias`.
    """
    check_arguments(logits, previous, embed, lm_head, gates)
    earlier = F.embedding(previous, embed)
    if gates is not None:
        earlier = earlier * gates
    return (logits + F.linear(earlier, lm_head)).to(logits.dtype)
