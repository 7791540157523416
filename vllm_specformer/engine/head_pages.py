"""The pages of the head's K and V: whose spec they have, and where in them K and V lie.

vLLM puts layers in one KV-cache group only if their specs are equal. So the head's layers have the
very spec of one of the target's full-attention layers, as its attention backend has customised it:
whatever the KV cache's dtype, the backend, the shapes and the ranks are, the target's groups stay
what they are without the head (docs/kv-groups.md). Their pages have that layer's size, dtype and
layout, but only the head reads and writes them.

A *row* is the K or V of one head and token. Every token has room for so many of the head's rows in
a layer's pages; a head with more rows than that has several layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.triton_utils.importing import HAS_TRITON
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
    replace_as,
)
from vllm.v1.worker.utils import customize_attention_spec

from vllm_specformer.errors import SpeculativeConfigError

_WHOLE_WINDOW = (
    "set disable_hybrid_kv_cache_manager=True, with which vLLM keeps all tokens of windowed layers"
)


def check_cache(vllm_config: VllmConfig) -> None:
    """Refuse caches that can hold no head, as far as the configuration tells.

    Raises:
        SpeculativeConfigError: see its message.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    if model.is_attention_free:
        raise SpeculativeConfigError(
            f"target {model.model}: it has no attention layer; a SpecFormer head keeps K/V of "
            "every token beside those of one",
            "serve it without speculation",
        )
    if model.is_hybrid and not HAS_TRITON:
        raise SpeculativeConfigError(
            f"target {model.model}: it has recurrent layers, which vLLM runs by other code on a "
            "CPU when it speculates; its text was then not the text without speculation",
            "serve it on a GPU, or without speculation",
        )
    text = model.hf_text_config
    windows = vllm_config.cache_config.sliding_window  # set if every layer has it
    if set(getattr(text, "layer_types", None) or ()) == {"sliding_attention"}:
        windows = windows or text.sliding_window
    if windows and not scheduler.disable_hybrid_kv_cache_manager:
        raise SpeculativeConfigError(
            f"target {model.model}: sliding_window={windows} in every layer, so vLLM frees pages "
            "that a SpecFormer head still reads (it sees the whole context)",
            f"{_WHOLE_WINDOW}, or serve it without speculation",
        )
    if getattr(vllm_config.attention_config, "hisparse_config", None) is not None:
        raise SpeculativeConfigError(
            "attention_config.hisparse_config: it keeps the KV cache on the host, where a "
            "SpecFormer head cannot read it",
            "leave it out, or serve without speculation",
        )
    _check_transfer(vllm_config)


def _check_transfer(vllm_config: VllmConfig) -> None:
    """Connectors take MLA caches for equal on all ranks; what ranks keep of a cut head is not."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    of_head = vllm_config.speculative_config.draft_parallel_config.tensor_parallel_size
    if vllm_config.kv_transfer_config is None or not vllm_config.model_config.use_mla:
        return
    if ranks > 1 and of_head > 1:
        raise SpeculativeConfigError(
            f"kv_transfer_config with an MLA target on {ranks} ranks: vLLM's connectors move one "
            "rank's cache for all, but a SpecFormer head is cut over the ranks",
            "set draft_tensor_parallel_size=1 in the speculative config",
        )


class Lender:
    """The target layer whose spec the head's layers have.

    Args:
        shape: what this rank keeps of the head.

    Raises:
        SpeculativeConfigError: no layer of the target can lend its spec.
    """

    def __init__(self, vllm_config: VllmConfig, shape: HeadShape) -> None:
        layers = target_layers(vllm_config)
        specs: dict[Any, Any] = {layer: _spec(layer, vllm_config) for layer in layers}
        lenders = {layer: spec for layer, spec in specs.items() if _keeps_all_tokens(spec)}
        self._is_promoted = False
        if not lenders and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            lenders = {layer: s for layer, s in specs.items() if type(s) is SlidingWindowSpec}
            self._is_promoted = bool(lenders)
        if not lenders:
            raise SpeculativeConfigError(_no_lender(vllm_config, specs.values()))
        # The widest, so that the head has few layers; the first of those.
        self._layer = max(lenders, key=lambda layer: rows_per_layer(lenders[layer], shape))
        rows = rows_per_layer(lenders[self._layer], shape)
        if not rows:
            spec = lenders[self._layer]
            raise SpeculativeConfigError(
                f"kv_cache_dtype={vllm_config.cache_config.cache_dtype!r}: a layer of the target "
                f"keeps {spec.num_heads * spec.state_content_size_bytes} bytes of a token, the "
                f"head's head_dim={shape.head_size} needs {shape.row_bytes} for one key",
                "set kv_cache_dtype to 'auto' or 'fp8', or serve on fewer ranks",
            )
        self.num_layers = layers_needed(rows, shape.kv_heads)

    def spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        """Its spec, which must be that of each of the head's layers."""
        spec = _spec(self._layer, vllm_config)
        assert isinstance(spec, AttentionSpec)
        if not self._is_promoted:
            return spec
        # As vLLM makes of the target's windowed layers as soon as there is one without a window.
        block_size = vllm_config.cache_config.block_size
        dropped = ("extra_retained_tokens", "sliding_window")
        return replace_as(spec, FullAttentionSpec, drop=dropped, block_size=block_size)


class DraftLayer(AttentionLayerBase):
    """A layer of the head, told apart from the target's by its class."""


def target_layers(vllm_config: VllmConfig) -> list[Any]:
    """The target's layers that have a KV cache of their own."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [
        layer
        for layer in layers
        if isinstance(layer, AttentionLayerBase)
        and not isinstance(layer, DraftLayer)
        and not getattr(layer, "kv_sharing_target_layer_name", None)
    ]


def _spec(layer: Any, vllm_config: VllmConfig) -> KVCacheSpec | None:
    """A layer's spec as the model runners ask for it."""
    spec = layer.get_kv_cache_spec(vllm_config)
    if isinstance(spec, AttentionSpec):
        return customize_attention_spec(layer.get_attn_backend(), spec)
    return spec


def _keeps_all_tokens(spec: Any) -> bool:
    """Whether every token keeps a place of its own in the cache until its request ends."""
    # Other kinds of full attention free pages or begin their block tables with pages of their own.
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
        return False
    is_indexer = getattr(spec, "cache_role", None) is SparseCacheRole.INDEXER
    return spec.tokens_per_state == 1 and not is_indexer


def _no_lender(vllm_config: VllmConfig, specs: Iterable[KVCacheSpec | None]) -> str:
    kinds = sorted({type(spec).__name__ for spec in specs if spec is not None})
    windowed = any(isinstance(spec, SlidingWindowSpec) for spec in specs)
    return (
        f"target {vllm_config.model_config.model}: its layers' caches are {', '.join(kinds)}; a "
        "SpecFormer head keeps K/V of every token and needs a layer that does, full attention; "
        + (f"{_WHOLE_WINDOW}, or " if windowed else "")
        + "serve it without speculation"
    )


@dataclass(frozen=True)
class HeadShape:
    """What one rank keeps of every token: K and V of `kv_heads` heads."""

    kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.head_size * self.dtype.itemsize


@dataclass(frozen=True)
class PagePart:
    """The pages of some neighbouring K/V heads, all of them in most heads.

    `key` and `value` are [num_blocks, heads, block_size, head_size], with equal strides.
    """

    heads: slice
    key: Tensor
    value: Tensor


def rows_per_layer(spec: Any, shape: HeadShape) -> int:
    """Rows of the head that one layer with this `AttentionSpec` holds of every token."""
    content = spec.state_content_size_bytes
    # Every physical layout keeps the content of a slot together, and most a whole page.
    in_slots = spec.num_heads * (content // shape.row_bytes)
    return int(in_slots or spec.num_heads * content // shape.row_bytes)


def layers_needed(rows: int, kv_heads: int) -> int:
    """Layers of so many rows for a head: one, or some that hold K and as many that hold V."""
    return 1 if 2 * kv_heads <= rows else 2 * -(-kv_heads // rows)


def lay_out(caches: Sequence[Tensor], shape: HeadShape, dense: bool) -> list[PagePart]:
    """The head's pages in those of its layers, in as few parts as can be.

    Args:
        caches: the pages of `layers_needed` layers as vLLM binds them, [num_blocks, slots,
            block_size, content] in any dtype and layout; all alike.
        dense: a head's rows of one page are to follow each other without gaps. Otherwise they stay,
            where the layout lets them, among the bytes of their token and of the slot of the same
            number, as the target's own do.

    Raises:
        SpeculativeConfigError: in this layout the pages do not hold the head.
    """
    caches = [cache.view(shape.dtype) for cache in caches]
    candidates = _dense_places if dense else _places
    found = [
        _parts(caches, shape.head_size, places, token_stride)
        for offsets, token_stride in candidates(caches[0], shape.head_size)
        for places in _assigned(shape.kv_heads, len(caches), offsets)
    ]
    if not found:
        raise SpeculativeConfigError(
            f"VLLM_KV_CACHE_LAYOUT: in the layout chosen, of pages {list(caches[0].shape)} with "
            f"strides {caches[0].stride()}, no slot has room for a key of head_dim="
            f"{shape.head_size}",
            "set it to LBHNC, where a page is one piece of memory",
        )
    return min(found, key=len)  # the first of the best


# The offsets of a page's rows, and the stride of tokens in them, in elements of the head's dtype.
_Candidate = tuple[list[int], int]
_Place = tuple[int, int]  # a layer, and an offset in its pages
_Sides = tuple[_Place, _Place]  # those of a head's K and V


def _places(cache: Tensor, head_size: int) -> Iterator[_Candidate]:
    """Rows beside each other in every slot of a token; then pages that are one piece of memory."""
    _, slots, _, content = cache.shape
    _, slot_stride, token_stride, _ = cache.stride()
    starts = range(0, content // head_size * head_size, head_size)
    yield [s * slot_stride + start for s in range(slots) for start in starts], token_stride
    yield from _whole_page(cache, head_size)


def _dense_places(cache: Tensor, head_size: int) -> Iterator[_Candidate]:
    """One row of all tokens after the other: in every slot, then in the page."""
    _, slots, tokens, content = cache.shape
    _, slot_stride, token_stride, _ = cache.stride()
    if token_stride == content:
        size = tokens * head_size
        starts = range(0, content // head_size * size, size)
        yield [s * slot_stride + start for s in range(slots) for start in starts], head_size
    yield from _whole_page(cache, head_size)
    yield from _places(cache, head_size)


def _whole_page(cache: Tensor, head_size: int) -> Iterator[_Candidate]:
    _, slots, tokens, content = cache.shape
    strides = cache.stride()[1:3]
    is_whole = strides in ((tokens * content, content), (content, slots * content))
    if is_whole or (slots == 1 and strides[1] == content):
        size = tokens * head_size
        yield [i * size for i in range(slots * content // head_size)], head_size


def _assigned(heads: int, layers: int, offsets: list[int]) -> Iterator[list[_Sides]]:
    """Ways to give every head's K and V a row each."""
    if layers > 1:  # the first half of the layers holds K, the second V
        share = -(-2 * heads // layers)
        if share <= len(offsets):
            rows = [(head // share, offsets[head % share]) for head in range(heads)]
            yield [((layer, o), (layers // 2 + layer, o)) for layer, o in rows]
    elif 2 * heads <= len(offsets):
        # V beside its K, as attention backends have it; or V after all K, as some have.
        yield [((0, offsets[2 * h]), (0, offsets[2 * h + 1])) for h in range(heads)]
        yield [((0, offsets[h]), (0, offsets[heads + h])) for h in range(heads)]


def _parts(
    caches: list[Tensor], head_size: int, places: list[_Sides], token_stride: int
) -> list[PagePart]:
    """Neighbouring heads at equal distances are one part."""
    runs: list[list[_Sides]] = []
    for sides in places:
        if not runs or not _continues(runs[-1], sides):
            runs.append([])
        runs[-1].append(sides)
    parts, first = [], 0
    for run in runs:
        step = run[1][0][1] - run[0][0][1] if len(run) > 1 else head_size
        key, value = (
            _view(caches[layer], offset, len(run), step, token_stride, head_size)
            for layer, offset in run[0]
        )
        parts.append(PagePart(slice(first, first + len(run)), key, value))
        first += len(run)
    return parts


def _continues(run: list[_Sides], sides: _Sides) -> bool:
    """Whether a head's K and V lie as far behind the last head's as those behind their last."""
    last = run[-1]
    if [layer for layer, _ in last] != [layer for layer, _ in sides]:
        return False
    key_step, value_step = (now[1] - before[1] for before, now in zip(last, sides, strict=True))
    return key_step == value_step and (len(run) == 1 or key_step == last[0][1] - run[-2][0][1])


def _view(
    cache: Tensor, offset: int, heads: int, head_stride: int, token_stride: int, head_size: int
) -> Tensor:
    blocks, _, tokens, _ = cache.shape
    return cache.as_strided(
        (blocks, heads, tokens, head_size),
        (cache.stride(0), head_stride, token_stride, 1),
        cache.storage_offset() + offset,
    )
