"""The layers that a SpecFormer head is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from specformer_kernels.swiglu import swiglu
from torch import Tensor, nn

from vllm_specformer.config import SpecFormerConfig


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Projections(nn.Module):
    """Query, key, value and output projections of one attention, without bias.

    Query, key and value are one matrix: at the few rows of a draft step the number of launches
    costs more than the arithmetic.
    """

    def __init__(self, config: SpecFormerConfig) -> None:
        super().__init__()
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        rows = (self.heads[0] + 2 * self.heads[1]) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.heads[0] * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotation: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H] -> query [..., heads, D] and key, value [..., K/V heads, D].

        Args:
            rotation: rotary embedding of queries and keys, [..., heads + K/V heads, D] -> the same.
        """
        heads, kv_heads = self.heads
        rows = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        query_key, value = rows.split([heads + kv_heads, kv_heads], dim=-2)
        if rotation is not None:
            query_key = rotation(query_key)
        query, key = query_key.split([heads, kv_heads], dim=-2)
        return query, key, value

    def split_weight(self) -> tuple[Tensor, Tensor]:
        """The part of the matrix that makes queries, and the part that makes keys and values."""
        rows = self.heads[0] * self.head_dim
        return self.qkv_proj.weight[:rows], self.qkv_proj.weight[rows:]

    def query(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., heads, D], not rotated."""
        return self.query_linear(x).unflatten(-1, (-1, self.head_dim))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H] -> key and value [..., K/V heads, D], not rotated."""
        key, value = self.key_value_linear(x).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        return key, value

    def query_linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.split_weight()[0])

    def key_value_linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.split_weight()[1])

    def output(self, attended: Tensor) -> Tensor:
        """[..., query heads, D] -> [..., H]"""
        return self.o_proj(attended.flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(size, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class SlotLayer(nn.Module):
    """Weights of one layer over the slots: attention and SwiGLU, both pre-norm and residual."""

    def __init__(self, config: SpecFormerConfig) -> None:
        super().__init__()
        self.slot_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.slot_attn = Projections(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)


def rotary_table(positions: int, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of every position, float32 [positions, head_dim]: cos first, then sin."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
