"""Engines and layers that cannot verify trees are refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
            is_attention_free=False,
            hf_text_config=SimpleNamespace(sliding_window=4096),
            get_sliding_window=lambda: changes.get("window"),
        ),
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
        ({"window": 4096}, "sliding_window=4096"),
        ({"cache_config__cache_dtype": "fp8_e4m3"}, "kv_cache_dtype='fp8_e4m3'"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"parallel_config__enable_dbo": True}, "enable_dbo"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling"),
        ({"watermark_config": object()}, "watermarks"),
        ({"aux_output_config__enabled": True}, "auxiliary outputs"),
    ],
)
def test_engines_that_cannot(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=f"tree_nodes cannot be had with .*{named}.*;"):
        check_trees(engine_config(**changes))


class Attention(TreeAttention):
    """A backend's implementation, as vLLM's have it."""

    def __init__(self, **changes: Any) -> None:
        self.sliding_window, self.logits_soft_cap = (-1, -1), 0
        self.alibi_slopes = self.sinks = self.kv_sharing_target_layer_name = None
        vars(self).update(changes)


def layer(impl: Any) -> Any:
    return SimpleNamespace(impl=impl, layer_name="model.layers.3.attn")


def test_layers_that_can() -> None:
    check_layers([layer(Attention()), layer(Attention(logits_soft_cap=None))])


@pytest.mark.parametrize(
    ("impl", "named"),
    [
        (object(), "layer model.layers.3.attn uses object; add --attention-backend FLASH_ATTN"),
        (Attention(sliding_window=(511, 0)), r"sliding_window=\(511, 0\) of layer model.layers.3"),
        (Attention(logits_soft_cap=30.0), "logits_soft_cap=30.0"),
        (Attention(kv_sharing_target_layer_name="other"), "kv_sharing_target_layer_name=other"),
    ],
)
def test_layers_that_cannot(impl: Any, named: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=named):
        check_layers([layer(Attention()), layer(impl)])


def test_v1_drafts_chains() -> None:
    head = SimpleNamespace(specformer_tree={"nodes": 16, "slots": 8})
    config = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=head))
    with pytest.raises(SpeculativeConfigError, match="tree_nodes needs vLLM's V2 model runner"):
        check_v1_verification(config)
