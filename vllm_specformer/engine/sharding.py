"""The head under tensor parallelism: every rank holds its share of the large matrices.

Split as vLLM splits a decoder layer: attention by heads, SwiGLU by its inner width, each summed
over the ranks afterwards; the downsampler and the positional projection by their outputs, gathered.
Norms, the bonus token's projection and the Markov term are small and stay whole on every rank. So
does the whole head where the shapes do not divide. docs/one-step.md has the arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.communication_op import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.head_layers import Projections, SwiGLU

logger = init_logger(__name__)


class HeadShard:
    """What part of a head this rank holds.

    Args:
        ranks: of the target.
        wanted: `draft_tensor_parallel_size`, the target's number of ranks or 1: not to be shared.
    """

    def __init__(self, config: SpecFormerConfig, ranks: int, wanted: int) -> None:
        sizes = (config.num_attention_heads, config.intermediate_size, config.hidden_size)
        kv_heads = config.num_key_value_heads
        odd = any(size % ranks for size in sizes) or (kv_heads % ranks and ranks % kv_heads)
        if odd:
            logger.info("%d ranks do not divide the head's shapes: each runs all of it", ranks)
        whole = odd or wanted == 1
        self.ranks: int = 1 if whole else ranks
        self.rank: int = get_tensor_model_parallel_rank() if self.ranks > 1 else 0
        self.heads = config.num_attention_heads // self.ranks
        # With more ranks than K/V heads, several ranks hold the same one.
        self.kv_heads = max(1, kv_heads // self.ranks)
        self._first_kv_head = self.rank * kv_heads // self.ranks

    def cut(self, head: SpecFormerHead) -> None:
        """Keep this rank's share of a loaded head's weights; have outputs summed or gathered."""
        if self.ranks == 1:
            return
        self._cut_attention(head.context_attn)
        for layer in head.slot_layers:
            self._cut_attention(layer.slot_attn)
            self._cut_swiglu(layer.ffn)
        _replace(head.fc, self._part(head.fc.weight, 0))
        _then(head.fc, tensor_model_parallel_all_gather)
        self._cut_slots(head)

    def _part(self, weight: Tensor, dim: int) -> Tensor:
        return weight.chunk(self.ranks, dim)[self.rank]

    def _cut_attention(self, attention: Projections) -> None:
        heads, kv_heads = attention.heads
        by_head = attention.qkv_proj.weight.unflatten(0, (-1, attention.head_dim))
        query, key, value = by_head.split([heads, kv_heads, kv_heads])
        first = self._first_kv_head
        own = [part[first : first + self.kv_heads] for part in (key, value)]
        _replace(attention.qkv_proj, torch.cat([self._part(query, 0), *own]).flatten(0, 1))
        _replace(attention.o_proj, self._part(attention.o_proj.weight, 1))
        _then(attention.o_proj, tensor_model_parallel_all_reduce)
        attention.heads = (self.heads, self.kv_heads)

    def _cut_swiglu(self, ffn: SwiGLU) -> None:
        gate, up = ffn.gate_up_proj.weight.chunk(2)
        _replace(ffn.gate_up_proj, torch.cat([self._part(gate, 0), self._part(up, 0)]))
        _replace(ffn.down_proj, self._part(ffn.down_proj.weight, 1))
        _then(ffn.down_proj, tensor_model_parallel_all_reduce)

    def _cut_slots(self, head: SpecFormerHead) -> None:
        """Of every slot's outputs a share, so that any leading slots can still be run alone."""
        proj, size = head.positional_proj, head.config.hidden_size
        weight, bias = (t.unflatten(0, (-1, size)) for t in (proj.weight, proj.bias))
        _replace(proj, self._part(weight, 1).flatten(0, 1), self._part(bias, 1).flatten())
        head.slot_width = size // self.ranks
        whole: Any = head.open_slots
        head.open_slots = partial(_gathered, whole)  # type: ignore[method-assign]


def _gathered(open_slots: Any, normed: Tensor, num_slots: int) -> Tensor:
    return tensor_model_parallel_all_gather(open_slots(normed, num_slots))


def _replace(module: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.clone(), requires_grad=False)
    module.out_features, module.in_features = weight.shape


def _then(module: nn.Linear, collective: Any) -> None:
    """Have a module's outputs go through a collective operation, however they are computed."""
    module.register_forward_hook(lambda _module, _inputs, output: collective(output))
