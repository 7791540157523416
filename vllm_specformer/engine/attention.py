"""The head's place in vLLM's paged KV cache: one attention layer with a backend of its own.

The layer joins the KV-cache group of the target's full-attention layers, so it shares their block
table and slot mapping and vLLM allocates, caches, preempts and frees its pages with theirs. Only
this layer reads or writes the contents, so it is free to use the logical layout
`[blocks, kv_heads, block_size, 2 * head_size]` whatever the target's backend packs into its own, or
on a CPU what vLLM's kernels want there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from specformer_kernels.block_attention import block_attention
from specformer_kernels.kv_store import kv_store
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from vllm_specformer.engine.cpu.pages import CpuContext, CpuPages, rotated


@dataclass
class DraftAttentionMetadata:
    """The common metadata as vLLM built it, if it did; the kernels need nothing more."""

    common: CommonAttentionMetadata | None


class DraftMetadataBuilder(AttentionMetadataBuilder[DraftAttentionMetadata]):
    """Hands the common metadata on: no per-step work, so any batch fits a CUDA graph."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DraftAttentionMetadata:
        return DraftAttentionMetadata(common_attn_metadata)


class DraftAttentionImpl:
    """vLLM asks every backend for an implementation class; ours lives in `DraftAttention`."""


class DraftAttentionBackend(AttentionBackend):
    forward_includes_kv_cache_update = False
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "SPECFORMER"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return DraftAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[DraftMetadataBuilder]:
        return DraftMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return tuple(KVCacheLayout)


class DraftAttention(nn.Module, AttentionLayerBase):
    """Pages of the head's context K/V, and attention over them.

    vLLM finds the layer through `static_forward_context`, asks for its cache spec, and binds
    `kv_cache` before the first step.
    """

    # Blocks that each row of the block table owns, integer [rows]. Set by a runner that
    # knows them, before the cache is bound: on a CPU it lets vLLM's kernels have the pages.
    block_counts: Callable[[], Tensor] | None = None

    def __init__(
        self,
        prefix: str,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        max_requests: int,
        block_widths: Iterable[int],
    ) -> None:
        super().__init__()
        config = get_current_vllm_config()
        self.layer_name = prefix
        self.num_kv_heads, self.head_size, self.scale = num_kv_heads, head_size, scale
        self.dtype = config.model_config.dtype
        self.kv_cache = torch.tensor([])
        self.impl = DraftAttentionImpl()
        context = config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"attention layer name {prefix!r} is taken by the target")
        context[prefix] = self
        # Constants of every block width in use, made once so that CUDA graphs see stable addresses.
        for rows in set(block_widths):
            starts = torch.arange(max_requests + 1, dtype=torch.int32) * rows
            word = -1 if rows == 64 else (1 << rows) - 1
            self.register_buffer(f"_starts{rows}", starts, persistent=False)
            mask = torch.full((max_requests * rows,), word, dtype=torch.int64)
            self.register_buffer(f"_mask{rows}", mask, persistent=False)
        blind = torch.zeros(max_requests, dtype=torch.int64)
        self.register_buffer("_blind", blind, persistent=False)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DraftAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
        )

    @property
    def is_bound(self) -> bool:
        """Whether vLLM has given the layer its pages (not during memory profiling)."""
        return self.kv_cache.numel() > 0

    def store(
        self,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        rotary_table: Tensor,
        positions: Tensor,
        query: Tensor | None,
        query_positions: Tensor | None,
    ) -> Tensor | None:
        """Rotate context rows [T, kv_heads, D] and write them to their slots [T]; -1 skips a row.

        Returns:
            The queries [R, heads, D], rotated; None if there are none.
        """
        if not self.is_bound:
            return query
        pages = self._cpu_pages()
        if pages is not None:
            pages.store(rotated(key, rotary_table, positions), value, slot_mapping)
            if query is None or query_positions is None:
                return None
            return rotated(query, rotary_table, query_positions)
        return kv_store(
            key,
            value,
            self.kv_cache,
            slot_mapping,
            rotary_table=rotary_table,
            positions=positions,
            query=query,
            query_positions=query_positions,
        )

    def begin(self, block_table: Tensor | None, context_lens: Tensor) -> DraftContext:
        """What one draft step attends to: the context before and including its anchors.

        Args:
            block_table: int32 [R, blocks].
            context_lens: int64 [R], tokens of each request up to its anchor, all stored.
        """
        if not self.is_bound or block_table is None:
            return UnboundContext()
        pages = self._cpu_pages()
        if pages is None:
            return PagedContext(self, block_table, context_lens)
        assert self.block_counts is not None
        counts = self.block_counts()[: len(block_table)]
        return CpuContext(pages, block_table, context_lens, counts, self.scale)

    def _cpu_pages(self) -> CpuPages | None:
        return None if self.block_counts is None else CpuPages.over(self.kv_cache)

    def paged(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor,
        context_lens: Tensor,
        mask: str,
    ) -> Tensor:
        """Rows [R, n, heads, D] see `context_lens` cached tokens and what buffer `mask` allows."""
        requests, rows = query.shape[:2]
        out = block_attention(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.kv_cache,
            table,
            context_lens,
            self.get_buffer(f"_starts{rows}")[: requests + 1],
            self.get_buffer(mask)[: requests * rows],
            self.scale,
            rows,
        )
        return out.view_as(query)


class DraftContext(Protocol):
    """One step's context, attended to by the anchors first and by the slots afterwards.

    The slots attend once in every slot layer, with other K/V of their own each time.
    """

    def anchors(self, query: Tensor) -> Tensor:
        """Anchor rows [R, heads, D] over their context, themselves included: [R, heads, D]."""

    def slots(self, query: Tensor, key: Tensor, value: Tensor, mixed: bool) -> Tensor:
        """Slot rows [R, n, heads, D] over each other and, if `mixed`, the context: same shape."""


class PagedContext:
    """Kernels that read the pages in place."""

    def __init__(self, layer: DraftAttention, block_table: Tensor, context_lens: Tensor) -> None:
        self.layer, self.table, self.lens = layer, block_table, context_lens

    def anchors(self, query: Tensor) -> Tensor:
        rows = query.unsqueeze(1)
        # Its own K/V are in the cache, so the block of one row is not to see itself; keys and
        # values that no row sees need only be finite.
        unseen = rows[:, :, : self.layer.num_kv_heads]
        out = self.layer.paged(rows, unseen, unseen, self.table, self.lens, "_blind")
        return out.squeeze(1)

    def slots(self, query: Tensor, key: Tensor, value: Tensor, mixed: bool) -> Tensor:
        lens = self.lens if mixed else torch.zeros_like(self.lens)
        return self.layer.paged(query, key, value, self.table, lens, f"_mask{query.shape[1]}")


class UnboundContext:
    """No cache yet (memory profiling): the step runs for its size, not for its result."""

    def anchors(self, query: Tensor) -> Tensor:
        return torch.zeros_like(query)

    def slots(self, query: Tensor, key: Tensor, value: Tensor, mixed: bool) -> Tensor:
        return torch.zeros_like(query)
