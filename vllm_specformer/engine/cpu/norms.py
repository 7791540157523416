"""The head's norms on a CPU: vLLM's own operation, one pass over the rows.

PyTorch has no such kernel for a CPU. It makes six passes, each with a new tensor as large as all
hooked states side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops

from vllm_specformer.head import SpecFormerHead
from vllm_specformer.head_layers import RMSNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, [..., H], scaled by `weight` [H]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    ops.rms_norm(out, x, weight, eps)
    return out


class HookNorm:
    """`grouped_rms_norm` with the weights of one head.

    In bfloat16 and float16 a value is rounded once more than there, before it is scaled.
    """

    def __init__(self, head: SpecFormerHead) -> None:
        self.weight, self.eps = head.hook_norm_weight, head.config.rms_norm_eps
        self.ones = torch.ones_like(self.weight[0])

    def __call__(self, hooked_states: Sequence[Tensor]) -> Tensor:
        """G hooked states [..., H] -> normalised, scaled and side by side, [..., G*H]."""
        joined = torch.stack(tuple(hooked_states), dim=-2)
        return rms_norm(joined, self.ones, self.eps).mul_(self.weight).flatten(-2)


def use_for(head: nn.Module) -> None:
    """Give the head's own norms this forward."""
    for module in head.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(  # type: ignore[method-assign]
                rms_norm, weight=module.weight, eps=module.eps
            )
