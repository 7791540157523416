"""The head's place in vLLM's paged KV cache: attention layers with a backend of their own.

The layers join the KV-cache group of the target's full-attention layers, so they share their block
table and slot mapping and vLLM allocates, caches, preempts and frees their pages with theirs. The
pages are laid out for the target; only the head reads or writes the contents of its own, so
`head_pages` finds places in them for its K and V, in its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from specformer_kernels.block_attention import block_attention, page_table
from specformer_kernels.kv_store import kv_store
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_specformer.engine.cpu.pages import CpuContext, CpuPages, rotated
from vllm_specformer.engine.head_pages import DraftLayer, HeadShape, Lender, PagePart, lay_out
from vllm_specformer.engine.patches.kv_groups import head_layer_name


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

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Of the text, which `checks.check_batch_invariance` sees to, not of the drafts."""
        return True

    @staticmethod
    def get_builder_cls() -> type[DraftMetadataBuilder]:
        return DraftMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]


class DraftPages(DraftLayer):
    """One layer as vLLM sees it: found through `static_forward_context`, asked for its spec, bound.

    Args:
        on_change: called when vLLM binds `kv_cache`, or lets it go by setting an empty tensor.
    """

    def __init__(self, name: str, lender: Lender, on_change: Callable[[DraftPages], None]) -> None:
        self.layer_name, self._lender, self._on_change = name, lender, on_change
        self.impl: Any = DraftAttentionImpl()
        self._kv_cache = torch.tensor([])

    @property
    def kv_cache(self) -> Tensor:
        """The layer's pages as they are laid out for the target."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: Tensor) -> None:
        self._kv_cache = kv_cache
        self._on_change(self)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DraftAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        return self._lender.spec(vllm_config)


class DraftAttention(nn.Module):
    """The head's context K/V in the pages of its layers, and attention over them.

    Args:
        first_layer: number of the first of the head's layers, which follow the target's.
        num_kv_heads: of this rank.
        window, sinks: tokens of the context that are seen, see `block_attention`; 0: all.
    """

    # Blocks that each row of the block table owns, integer [rows]. Set by a runner that
    # knows them, before the cache is bound: on a CPU it lets vLLM's kernels have the pages.
    block_counts: Callable[[], Tensor] | None = None
    # Tokens of a block in the runner's block tables, set by the runner before the first step. Where
    # the target's backend wants smaller pages, vLLM cuts the cache into those and leaves the tables
    # as they are. None: a block is a page.
    table_block_size: int | None = None

    def __init__(
        self,
        first_layer: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        max_requests: int,
        block_widths: Iterable[int],
        window: int = 0,
        sinks: int = 0,
    ) -> None:
        super().__init__()
        config = get_current_vllm_config()
        self.scale, self.window, self.sinks = scale, window, sinks
        self.shape = HeadShape(num_kv_heads, head_size, config.model_config.dtype)
        lender = Lender(config, self.shape)
        layers = range(first_layer, first_layer + lender.num_layers)
        self.layers = [DraftPages(head_layer_name(i), lender, self._changed) for i in layers]
        self._parts: list[PagePart] = []
        context = config.compilation_config.static_forward_context
        for layer in self.layers:
            if layer.layer_name in context:
                raise ValueError(f"attention layer name {layer.layer_name!r} is taken")
            context[layer.layer_name] = layer
        # Constants of every block width in use, made once so that CUDA graphs see stable addresses.
        for rows in set(block_widths):
            starts = torch.arange(max_requests + 1, dtype=torch.int32) * rows
            word = -1 if rows == 64 else (1 << rows) - 1
            self.register_buffer(f"_starts{rows}", starts, persistent=False)
            mask = torch.full((max_requests * rows,), word, dtype=torch.int64)
            self.register_buffer(f"_mask{rows}", mask, persistent=False)
        blind = torch.zeros(max_requests, dtype=torch.int64)
        self.register_buffer("_blind", blind, persistent=False)

    @property
    def layer_name(self) -> str:
        """Of the first layer; the others have the same block table and slot mapping."""
        return self.layers[0].layer_name

    @property
    def is_bound(self) -> bool:
        """Whether vLLM has given the layers their pages (not during memory profiling)."""
        return bool(self._parts)

    def _changed(self, layer: DraftPages) -> None:
        """Find the head's places anew; views of pages must not keep memory that vLLM lets go."""
        self._parts = []
        if layer is self.layers[-1] and layer.kv_cache.numel():  # vLLM binds them in order
            caches = [layer.kv_cache for layer in self.layers]
            self._parts = lay_out(caches, self.shape, dense=self._has_cpu_kernels)

    @property
    def _has_cpu_kernels(self) -> bool:
        """Whether vLLM's CPU kernels are to read the pages. They know no window with sinks."""
        return self.block_counts is not None and not self.window

    @property
    def pages_per_block(self) -> int:
        """Pages of the bound cache that one block of the runner's tables stands for.

        Raises:
            ValueError: pages and blocks do not fit each other.
        """
        page_size = self._parts[0].key.shape[2]
        block_size = self.table_block_size or page_size
        if block_size % page_size:
            raise ValueError(
                f"blocks of {block_size} tokens are no multiple of the KV cache's pages of "
                f"{page_size}; set --block-size to a multiple of {page_size}"
            )
        return block_size // page_size

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
        parts, pages = self._parts, self._cpu_pages()
        if pages:
            key = rotated(key, rotary_table, positions)
            for part, page in zip(parts, pages, strict=True):
                page.store(key[:, part.heads], value[:, part.heads], slot_mapping)
            if query is None or query_positions is None:
                return None
            return rotated(query, rotary_table, query_positions)
        queries = None
        for part in parts:
            is_first = part is parts[0]
            out = kv_store(
                key[:, part.heads],
                value[:, part.heads],
                part.key,
                slot_mapping,
                rotary_table=rotary_table,
                positions=positions,
                query=query if is_first else None,
                query_positions=query_positions if is_first else None,
                value_cache=part.value,
            )
            queries = out if is_first else queries
        return queries

    def begin(self, block_table: Tensor | None, context_lens: Tensor) -> DraftContext:
        """What one draft step attends to: the context before and including its anchors.

        Args:
            block_table: int32 [R, blocks].
            context_lens: int64 [R], tokens of each request up to its anchor, all stored.
        """
        if not self.is_bound or block_table is None:
            return UnboundContext()
        parts, pages = self._parts, self._cpu_pages()
        contexts: list[DraftContext]
        if pages:
            assert self.block_counts is not None
            counts = self.block_counts()[: len(block_table)] * self.pages_per_block
            table = page_table(block_table, self.pages_per_block)
            contexts = [CpuContext(page, table, context_lens, counts, self.scale) for page in pages]
        else:
            contexts = [PagedContext(self, part, block_table, context_lens) for part in parts]
        if len(parts) == 1:
            return contexts[0]
        return SplitContext([part.heads for part in parts], contexts, self.shape.kv_heads)

    def _cpu_pages(self) -> list[CpuPages]:
        """The parts as vLLM's CPU kernels have them; empty where those do not take them."""
        if not self._has_cpu_kernels:
            return []
        pages = [CpuPages.over(part.key, part.value) for part in self._parts]
        return [page for page in pages if page is not None] if all(pages) else []

    def paged(
        self,
        part: PagePart,
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
            part.key,
            table,
            context_lens,
            self.get_buffer(f"_starts{rows}")[: requests + 1],
            self.get_buffer(mask)[: requests * rows],
            self.scale,
            rows,
            part.value,
            self.pages_per_block,
            self.window,
            self.sinks,
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

    def __init__(
        self, layer: DraftAttention, part: PagePart, block_table: Tensor, context_lens: Tensor
    ) -> None:
        self.layer, self.part, self.table, self.lens = layer, part, block_table, context_lens

    def anchors(self, query: Tensor) -> Tensor:
        rows = query.unsqueeze(1)
        # Its own K/V are in the cache, so the block of one row is not to see itself; keys and
        # values that no row sees need only be finite.
        unseen = rows[:, :, : self.part.key.shape[1]]
        out = self.layer.paged(self.part, rows, unseen, unseen, self.table, self.lens, "_blind")
        return out.squeeze(1)

    def slots(self, query: Tensor, key: Tensor, value: Tensor, mixed: bool) -> Tensor:
        lens = self.lens if mixed else torch.zeros_like(self.lens)
        return self.layer.paged(
            self.part, query, key, value, self.table, lens, f"_mask{query.shape[1]}"
        )


class SplitContext:
    """K/V heads whose pages lie in several parts, each a context of its own."""

    def __init__(
        self, parts: list[slice], contexts: Sequence[DraftContext], num_kv_heads: int
    ) -> None:
        self.parts, self.contexts, self.num_kv_heads = parts, contexts, num_kv_heads

    def _queries(self, query: Tensor) -> list[Tensor]:
        """Each part's share of query heads [..., heads, D]."""
        group = query.shape[-2] // self.num_kv_heads
        return list(query.split([group * (p.stop - p.start) for p in self.parts], dim=-2))

    def anchors(self, query: Tensor) -> Tensor:
        shares = zip(self.contexts, self._queries(query), strict=True)
        return torch.cat([context.anchors(share) for context, share in shares], dim=-2)

    def slots(self, query: Tensor, key: Tensor, value: Tensor, mixed: bool) -> Tensor:
        outs = [
            context.slots(share, key[..., part, :], value[..., part, :], mixed)
            for part, context, share in zip(
                self.parts, self.contexts, self._queries(query), strict=True
            )
        ]
        return torch.cat(outs, dim=-2)


class UnboundContext:
    """No cache yet (memory profiling): the step runs for its size, not for its result."""

    def anchors(self, query: Tensor) -> Tensor:
        return torch.zeros_like(query)

    def slots(self, query: Tensor, key: Tensor, value: Tensor, mixed: bool) -> Tensor:
        return torch.zeros_like(query)
