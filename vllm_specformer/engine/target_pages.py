"""Which of the target's layers lends the head its KV-cache spec, and where none can.

vLLM puts layers in one KV-cache group only if their specs are equal. So the head's layers have the
very spec of one of the target's full-attention layers, as its attention backend has customised it:
whatever the KV cache's dtype, the backend, the shapes and the ranks are, the target's groups stay
what they are without the head (docs/kv-groups.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
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

from vllm_specformer.engine.page_layout import HeadShape, layers_needed, rows_per_layer
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
    text = model.hf_text_config
    windows = vllm_config.cache_config.sliding_window  # set if every layer has it
    if set(getattr(text, "layer_types", None) or ()) == {"sliding_attention"}:
        windows = windows or text.sliding_window
    if windows and not scheduler.disable_hybrid_kv_cache_manager:
        raise SpeculativeConfigError(
            f"target {model.model}: sliding_window={windows} in every layer, so vLLM frees pages "
            "that a SpecFormer head still reads (it sees the whole context); "
            f"{_WHOLE_WINDOW}, or serve it without speculation"
        )
    if getattr(vllm_config.attention_config, "hisparse_config", None) is not None:
        raise SpeculativeConfigError(
            "attention_config.hisparse_config: it keeps the KV cache on the host, where a "
            "SpecFormer head cannot read it; leave it out, or serve without speculation"
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
            "rank's cache for all, but a SpecFormer head is cut over the ranks; set "
            "draft_tensor_parallel_size=1 in the speculative config"
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
                f"head's head_dim={shape.head_size} needs {shape.row_bytes} for one key; set "
                "kv_cache_dtype to 'auto' or 'fp8', or serve on fewer ranks"
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
