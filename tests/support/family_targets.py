"""Tiny random targets of many families, each with what is particular to the family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

from vllm_specformer.target.model import auto_class

# Vocabularies are no multiple of 64, to which vLLM pads them.
SHAPE: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Tokens that stand for images and videos, in families that read them.
IMAGE, VIDEO, VISION_START, VISION_END = 320, 321, 322, 323
# For configurations that derive the head size.
WIDE = {key: value for key, value in SHAPE.items() if key != "head_dim"} | {"hidden_size": 128}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class TinyFamily:
    """What the family has that others have not, and its configuration.

    `architecture` is of the model that is built, where a configuration fits several.
    """

    particular: str
    config: Callable[[], hf.PreTrainedConfig]
    architecture: str | None = None


def _yarn(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": factor,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


def _sees(
    config: type[hf.PreTrainedConfig], text: dict[str, Any], vision: dict[str, Any]
) -> hf.PreTrainedConfig:
    """A model that reads images and videos beside text."""
    return config(
        text_config=text,
        vision_config=VISION | {"out_hidden_size": text["hidden_size"]} | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


# Halves of 32 / 2 frequencies that follow time, height and width.
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_INTERLEAVED = _MROPE | {"mrope_interleaved": True}
_DEEPSTACK = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
_PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
_RECURRENT = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": _INTERLEAVED | {"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]},
}

FAMILIES: dict[str, TinyFamily] = {
    "llama": TinyFamily(
        "llama3 RoPE scaling, untied",
        lambda: hf.LlamaConfig(
            **SHAPE | {"vocab_size": 300},
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "llama-biased": TinyFamily(
        "biases, linear RoPE scaling, no GQA, tied",
        lambda: hf.LlamaConfig(
            **SHAPE | {"num_key_value_heads": 4},
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        ),
    ),
    "mistral": TinyFamily(
        "one K/V head, YaRN",
        lambda: hf.MistralConfig(
            **SHAPE | {"num_key_value_heads": 1}, sliding_window=None, rope_parameters=_yarn(4.0)
        ),
    ),
    "mistral-sliding": TinyFamily(
        "sliding window in every layer", lambda: hf.MistralConfig(**SHAPE, sliding_window=32)
    ),
    "qwen2": TinyFamily(
        "bias of queries, keys, values; tied",
        lambda: hf.Qwen2Config(**WIDE, tie_word_embeddings=True),
    ),
    "qwen3": TinyFamily(
        "norms of queries and keys; tied", lambda: hf.Qwen3Config(**SHAPE, tie_word_embeddings=True)
    ),
    "qwen3-moe": TinyFamily(
        "mixture of experts",
        lambda: hf.Qwen3MoeConfig(**SHAPE, **MOE, decoder_sparse_step=1, norm_topk_prob=True),
    ),
    "granite": TinyFamily(
        "scales of embedding, residuals, attention and logits; tied",
        lambda: hf.GraniteConfig(
            **SHAPE,
            tie_word_embeddings=True,
            embedding_multiplier=2.5,
            logits_scaling=4.0,
            residual_multiplier=0.8,
            attention_multiplier=0.25,
        ),
    ),
    "gemma4": TinyFamily(
        "scaled embedding, softcap, per-layer embeddings, layers of two shapes, shared K/V; tied",
        lambda: hf.Gemma4TextConfig(
            **SHAPE | {"num_hidden_layers": 6},
            vocab_size_per_layer_input=331,
            hidden_size_per_layer_input=16,
            global_head_dim=64,
            num_kv_shared_layers=2,
            sliding_window=32,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            final_logit_softcapping=30.0,
        ),
    ),
    "gpt-oss": TinyFamily(
        "attention sinks, alternating windows, mixture of experts",
        lambda: hf.GptOssConfig(
            **SHAPE,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=32,
            rope_parameters=_yarn(4.0),
        ),
    ),
    "phi3": TinyFamily(
        "partial rotary embedding", lambda: hf.Phi3Config(**WIDE, partial_rotary_factor=0.75)
    ),
    "ernie4_5": TinyFamily("interleaved rotary embedding", lambda: hf.Ernie4_5Config(**SHAPE)),
    "qwen2.5-vl": TinyFamily(
        "reads images; M-RoPE, windows in the vision tower",
        lambda: _sees(
            hf.Qwen2_5_VLConfig,
            WIDE | {"rope_parameters": _MROPE},
            {"window_size": 16, "fullatt_block_indexes": [1]},
        ),
    ),
    "qwen3-vl": TinyFamily(
        "reads images; interleaved M-RoPE, image features in several layers",
        lambda: _sees(hf.Qwen3VLConfig, SHAPE | {"rope_parameters": _INTERLEAVED}, _DEEPSTACK),
    ),
    "olmo2": TinyFamily("Transformers code inside vLLM", lambda: hf.Olmo2Config(**WIDE)),
    "starcoder2": TinyFamily(
        "the same, with LayerNorm and biases",
        lambda: hf.Starcoder2Config(**WIDE, tie_word_embeddings=False),
    ),
}


# A head can be trained for these; docs/families.md says why there is no row of them being served.
TRIED: dict[str, TinyFamily] = {
    "qwen3-vl-moe": TinyFamily(
        "reads images, mixture of experts",
        lambda: _sees(
            hf.Qwen3VLMoeConfig,
            SHAPE
            | MOE
            | {
                "decoder_sparse_step": 1,
                "norm_topk_prob": True,
                "rope_parameters": _INTERLEAVED,
            },
            _DEEPSTACK,
        ),
    ),
    "qwen3.5": TinyFamily(
        "recurrent layers and full attention, gated",
        lambda: hf.Qwen3_5TextConfig(**SHAPE, **_RECURRENT),
    ),
    "qwen3.5-vl": TinyFamily(
        "the same, reads images; M-RoPE",
        lambda: _sees(hf.Qwen3_5Config, SHAPE | _RECURRENT, {"num_position_embeddings": 64}),
        "Qwen3_5ForConditionalGeneration",
    ),
    "qwen3-next": TinyFamily(
        "recurrent layers and full attention, mixture of experts with a shared one",
        lambda: hf.Qwen3NextConfig(
            **SHAPE | MOE | _RECURRENT | {"rope_parameters": _PARTIAL},
            shared_expert_intermediate_size=32,
        ),
    ),
    "deepseek-v2": TinyFamily(
        "multi-head latent attention, a dense layer before mixtures with a shared expert",
        lambda: hf.DeepseekV2Config(
            **{key: value for key, value in SHAPE.items() if key != "head_dim"}
            | {"num_key_value_heads": 4},
            kv_lora_rank=512,  # the one size that vLLM has a CPU kernel for, with 64 rotated
            q_lora_rank=None,
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=32,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            moe_intermediate_size=32,
        ),
    ),
}


def make_target(family: str, seed: int = 0) -> hf.PreTrainedModel:
    """The family's target in float32, with weights large enough for it to say varied things."""
    torch.manual_seed(seed)
    tiny = (FAMILIES | TRIED)[family]
    config = tiny.config()
    model = auto_class(config, tiny.architecture).from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # not all ones, so that a lost one shows
        else:
            torch.nn.init.normal_(parameter, std=0.12)
    return model
