"""Engines and layers that cannot verify trees are refused by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import envs
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_specformer.engine.candidates.attention import TreeAttention
from vllm_specformer.engine.candidates.checks import check_layers, check_trees
from vllm_specformer.engine.checks import check_v1_verification
from vllm_specformer.errors import SpeculativeConfigError


def engine_config(**changes: Any) -> Any:
    """What vLLM's configuration says of an engine that can; `part__field` changes one."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            use_mla=False,
            is_hybrid=False,
            uses_mrope=False,
            is_attention_free=False,
            dtype=torch.bfloat16,
            attention_chunk_size=None,
            rswa_window=None,
            is_mm_prefix_lm=False,
            get_sliding_window=lambda: changes.get("window"),
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        cache_config=SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=False),
        parallel_config=SimpleNamespace(enable_dbo=False, enable_batch_sharded_sampling=False),
        kv_transfer_config=None,
        watermark_config=None,
        aux_output_config=SimpleNamespace(enabled=False),
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(getattr(config, part), field, value)
        elif name != "window":
            setattr(config, name, value)
    return config


def test_an_engine_that_can() -> None:
    check_trees(engine_config())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__is_hybrid": True}, "recurrent layers"),
        ({"model_config__is_attention_free": True}, "recurrent layers"),
        ({"model_config__uses_mrope": True}, "M-RoPE"),
        ({"window": 4096}, "sliding_window=4096"),
        ({"model_config__attention_chunk_size": 8192}, "attention_chunk_size=8192"),
        ({"model_config__rswa_window": 512}, "rswa_window=512"),
        ({"model_config__is_mm_prefix_lm": True}, "is_mm_prefix_lm=True"),
        ({"compilation_config__cudagraph_mode": CUDAGraphMode.FULL}, "cudagraph_mode=FULL"),
        ({"cache_config__cache_dtype": "fp8_e4m3"}, "kv_cache_dtype='fp8_e4m3'"),
        ({"cache_config__cache_dtype": "float16"}, "kv_cache_dtype='float16'"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"parallel_config__enable_dbo": True}, "enable_dbo"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling"),
        ({"watermark_config": object()}, "watermarks"),
        ({"aux_output_config__enabled": True}, "auxiliary outputs"),
    ],
)
def test_engines_that_cannot(changes: dict[str, Any], named: str) -> None:
    message = f"tree_nodes cannot be combined with .*{named}.*;"
    with pytest.raises(SpeculativeConfigError, match=message):
        check_trees(engine_config(**changes))


def test_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True)
    with pytest.raises(SpeculativeConfigError, match="VLLM_BATCH_INVARIANT=1"):
        check_trees(engine_config())


class Attention(TreeAttention):
    """A backend's implementation, as vLLM's have it."""

    def __init__(self, **changes: Any) -> None:
        self.sliding_window, self.logits_soft_cap = (-1, -1), 0
        self.alibi_slopes = self.sinks = self.kv_sharing_target_layer_name = None
        self.attn_type = AttentionType.DECODER
        vars(self).update(changes)


SPEC = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=512
)


def layer(impl: Any, spec: Any = SPEC, **more: Any) -> Any:
    name = "model.layers.3.attn"
    return SimpleNamespace(
        impl=impl, layer_name=name, get_kv_cache_spec=lambda config: spec, **more
    )


def check(*layers: Any) -> None:
    check_layers(layers, engine_config())


def test_layers_that_can() -> None:
    check(layer(Attention()), layer(Attention(logits_soft_cap=None)))


@pytest.mark.parametrize(
    ("impl", "named"),
    [
        (object(), "layer model.layers.3.attn uses object; add --attention-backend FLASH_ATTN"),
        (Attention(sliding_window=(511, 0)), r"sliding_window=\(511, 0\) of layer model.layers.3"),
        (Attention(logits_soft_cap=30.0), "logits_soft_cap=30.0"),
        (Attention(kv_sharing_target_layer_name="other"), "kv_sharing_target_layer_name=other"),
        (Attention(attn_type=AttentionType.ENCODER_ONLY), "attn_type="),
    ],
)
def test_layers_that_cannot(impl: Any, named: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=named):
        check(layer(Attention()), layer(impl))


@pytest.mark.parametrize(
    ("unfit", "named"),
    [
        (layer(Attention(), WINDOW), "a cache of kind SlidingWindowSpec"),
        (layer(Attention(), replace(SPEC, dtype=torch.float16)), "a cache of torch.float16"),
        (layer(Attention(), kv_cache_update_bypass=True), "written by the model itself"),
    ],
)
def test_caches_that_trees_cannot_read(unfit: Any, named: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=named):
        check(unfit)


def test_v1_drafts_chains() -> None:
    head = SimpleNamespace(specformer_tree={"nodes": 16, "slots": 8})
    config = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=head))
    with pytest.raises(SpeculativeConfigError, match="tree_nodes needs vLLM's V2 model runner"):
        check_v1_verification(config)
