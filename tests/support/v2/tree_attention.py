"""Attention over trees on a CPU: the plugin's, on a backend that keeps V beside K.

vLLM's own CPU attention packs its pages in a way of its own. GPUs run FlashAttention, whose pages
are laid out as these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_specformer.engine.candidates.attention import TreeAttention


class PlainAttention(CPUAttentionBackendImpl):
    """Causal attention over pages of [..., K, V], request by request."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        size, page = key.shape[-1], kv_cache.shape[2]
        slots = slot_mapping[: len(key)].long()
        kept = slots >= 0
        at = slots[kept]
        rows = torch.cat([key, value], dim=-1)[: len(slots)][kept]
        assert rows.shape[-1] == 2 * size
        kv_cache[at // page, :, at % page] = rows

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attn_metadata is None:
            return output
        size, page = query.shape[-1], kv_cache.shape[2]
        starts, lens = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for request, length in enumerate(lens):
            first, end = starts[request], starts[request + 1]
            if first == end:
                continue
            table = attn_metadata.block_table[request, : -(-length // page)].long()
            rows = kv_cache[table].transpose(0, 1).flatten(1, 2)[:, :length]
            at = length - (end - first) + torch.arange(end - first)
            out = F.scaled_dot_product_attention(
                query[first:end].transpose(0, 1)[None],
                rows[None, ..., :size],
                rows[None, ..., size:],
                attn_mask=torch.arange(length) <= at[:, None],
                scale=self.scale,
                enable_gqa=True,
            )
            output[first:end] = out[0].transpose(0, 1).reshape(output[first:end].shape)
        return output


class TreePlainAttention(TreeAttention, PlainAttention):
    """As TreeFlashAttentionImpl is made from FlashAttentionImpl."""


@contextmanager
def tree_attention(impl: type = TreePlainAttention) -> Iterator[None]:
    """Let engines that are started meanwhile attend by `impl`."""
    with mock.patch.object(CPUAttentionBackend, "get_impl_cls", staticmethod(lambda: impl)):
        yield
