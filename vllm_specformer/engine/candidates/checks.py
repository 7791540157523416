"""What trees of candidates cannot be combined with, refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vllm import envs
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_specformer.engine.candidates.attention import TreeAttention
from vllm_specformer.engine.speculative_config import TREE
from vllm_specformer.errors import SpeculativeConfigError

_CHAINS = f"leave {TREE!r} out: chains of drafts work there"


def check_trees(vllm_config: Any) -> None:
    """Refuse engines that cannot verify trees, before any weights are loaded.

    Raises:
        SpeculativeConfigError: names the first field that stands against them.
    """
    problem = next(_problems(vllm_config), None)
    if problem is not None:
        raise SpeculativeConfigError(
            f"speculative config: {TREE} cannot be combined with {problem}", _CHAINS
        )


def _problems(vllm_config: Any) -> Iterator[str]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    if getattr(model, "use_mla", False):
        yield "a target with multi-head latent attention (MLA), whose cache is not K beside V"
    if getattr(model, "is_hybrid", False) or getattr(model, "is_attention_free", False):
        yield "a target with recurrent layers, whose state has no branches"
    if getattr(model, "uses_mrope", False):
        yield (
            "a target whose positions have several dimensions (M-RoPE): vLLM counts them row by "
            "row, not along a tree"
        )
    for name in ("attention_chunk_size", "rswa_window", "is_mm_prefix_lm"):
        if value := getattr(model, name, None):
            yield f"{name}={value} of the target: attention over trees sees the whole context"
    if window := model.get_sliding_window():
        yield f"sliding_window={window}: attention over trees sees the whole context"
    if cache.cache_dtype != "auto":
        yield f"kv_cache_dtype={cache.cache_dtype!r}: attention over trees wants the model's own"
    if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL:
        yield (
            "cudagraph_mode=FULL, one graph for batches with and without trees "
            "(FULL_AND_PIECEWISE, the default, works)"
        )
    if envs.VLLM_BATCH_INVARIANT:
        yield "VLLM_BATCH_INVARIANT=1: the batch decides in which order attention over trees sums"
    if getattr(cache, "kv_sharing_fast_prefill", False):
        yield "kv_sharing_fast_prefill"
    if vllm_config.kv_transfer_config is not None:
        yield "a KV connector, which may take K and V before the accepted path is in its place"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0):
        yield "micro-batches (enable_dbo), which split the rows that a tree stands in"
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        yield "enable_batch_sharded_sampling: every rank has to know all accepted paths"
    if getattr(vllm_config, "watermark_config", None) is not None:
        yield "watermarks, which depend on the tokens before a row"
    if getattr(getattr(vllm_config, "aux_output_config", None), "enabled", False):
        yield "auxiliary outputs, which are handed out row by row"


def check_layers(layers: Sequence[Any], vllm_config: Any) -> None:
    """Refuse a target with an attention layer that cannot attend along trees.

    Raises:
        SpeculativeConfigError: names the backend, or the property of a layer.
    """
    for layer in layers:
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, TreeAttention):
            raise SpeculativeConfigError(
                f"speculative config: {TREE} needs attention backend FLASH_ATTN, and layer "
                f"{getattr(layer, 'layer_name', '?')} uses {type(impl).__name__}",
                f"add --attention-backend FLASH_ATTN, or {_CHAINS}",
            )
        if (missing := impl.missing() or _unfit_cache(layer, vllm_config)) is not None:
            raise SpeculativeConfigError(
                f"speculative config: {TREE} cannot be combined with {missing} of layer "
                f"{getattr(layer, 'layer_name', '?')}",
                _CHAINS,
            )


def _unfit_cache(layer: Any, vllm_config: Any) -> str | None:
    """What of a layer's cache attention over trees cannot read, or None."""
    spec = layer.get_kv_cache_spec(vllm_config)
    if type(spec) is not FullAttentionSpec:  # windows, chunks and the like are kinds of it
        return f"a cache of kind {type(spec).__name__}"
    if spec.dtype != vllm_config.model_config.dtype:
        return f"a cache of {spec.dtype}"
    if getattr(layer, "kv_cache_update_bypass", False):  # 0.33
        return "K and V written by the model itself"
    return None
