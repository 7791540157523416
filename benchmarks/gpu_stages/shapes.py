"""Targets and draft heads of published sizes: configurations and the shapes of their weights.

Nothing here needs a download. A target is its `config.json` alone and is served with
`load_format: dummy`. A head gets a checkpoint of random weights, because vLLM loads some heads
differently without one (it would share the target's whole lm_head with a head that has a small one
of its own). What a step costs depends on shapes, not on values.

Sizes: Qwen3-4B, 8B and 14B as published. EAGLE-3: one layer, three hooks, 32,000 scored tokens.
P-EAGLE: the same with four layers, as its heads for gpt-oss. DFlash: five layers, five hooks, the
target's lm_head. DSpark: DFlash with a Markov term of rank 256 and a confidence head, unused here;
the published file also repeats the target's embedding and lm_head, which we share instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]

SCORED_TOKENS = 32_000
MASK_TOKEN = 7
MARKOV_RANK = 256


@dataclass(frozen=True)
class TargetShape:
    """A Qwen3 decoder."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    tied: bool
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151_936
    max_length: int = 4096

    def layer_config(self) -> dict[str, Any]:
        """The fields a decoder layer of these sizes has, in a target's or a head's config."""
        return {
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim, "vocab_size": self.vocab_size, "hidden_act": "silu",
            "attention_bias": False, "rms_norm_eps": 1e-6, "model_type": "qwen3",
            "max_position_embeddings": self.max_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }  # fmt: skip

    def config(self) -> dict[str, Any]:
        """`config.json` of the target."""
        return self.layer_config() | {
            "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": self.num_layers,
            "tie_word_embeddings": self.tied, "dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip

    def hooks(self, number: int) -> list[int]:
        """Ids of `number` layers spread over the target, as the published heads have them."""
        last = self.num_layers - 2
        return [2 + round(i * (last - 2) / (number - 1)) for i in range(number)]


TARGETS = {
    shape.name: shape
    for shape in (
        TargetShape("8b", 4096, 36, 32, 12_288, tied=False),
        TargetShape("4b", 2560, 36, 32, 9_728, tied=True),
        TargetShape("14b", 5120, 40, 40, 17_408, tied=False),
    )
}
TOY = TargetShape("toy", 64, 8, 2, 128, True, num_kv_heads=2, head_dim=32, vocab_size=512)


@dataclass(frozen=True)
class Head:
    """A checkpoint: its config, its tensors, and the speculative config that names its method."""

    config: dict[str, Any]
    tensors: Shapes
    speculative: dict[str, Any]


def decoder_layer(prefix: str, target: TargetShape, attention_input: int) -> Shapes:
    """Tensors of a Qwen3 decoder layer whose attention reads `attention_input` features."""
    size, inner, dim = target.hidden_size, target.intermediate_size, target.head_dim
    queries, keys = target.num_heads * dim, target.num_kv_heads * dim
    return {
        f"{prefix}.self_attn.q_proj.weight": (queries, attention_input),
        f"{prefix}.self_attn.k_proj.weight": (keys, attention_input),
        f"{prefix}.self_attn.v_proj.weight": (keys, attention_input),
        f"{prefix}.self_attn.o_proj.weight": (size, queries),
        f"{prefix}.self_attn.q_norm.weight": (dim,),
        f"{prefix}.self_attn.k_norm.weight": (dim,),
        f"{prefix}.mlp.gate_proj.weight": (inner, size),
        f"{prefix}.mlp.up_proj.weight": (inner, size),
        f"{prefix}.mlp.down_proj.weight": (size, inner),
        f"{prefix}.input_layernorm.weight": (size,),
        f"{prefix}.post_attention_layernorm.weight": (size,),
    }


def eagle3(target: TargetShape) -> Head:
    return _eagle(target, layers=1, parallel=False)


def peagle(target: TargetShape) -> Head:
    return _eagle(target, layers=4, parallel=True)


def _eagle(target: TargetShape, layers: int, parallel: bool) -> Head:
    size, hooks = target.hidden_size, 3
    scored = min(SCORED_TOKENS, target.vocab_size // 2)
    tensors: Shapes = {"fc.weight": (size, hooks * size), "norm.weight": (size,)}
    for layer in range(layers):
        prefix = f"layers.{layer}"
        # The first layer reads the token's embedding beside the state.
        tensors |= decoder_layer(prefix, target, size if layer else 2 * size)
        tensors[f"{prefix}.hidden_norm.weight"] = (size,)
    tensors |= {"lm_head.weight": (scored, size), "d2t": (scored,)}
    own = {"draft_vocab_size": scored, "eagle_aux_hidden_state_layer_ids": target.hooks(hooks)}
    if parallel:
        own["mask_token_id"] = MASK_TOKEN
        tensors["mask_hidden"] = (1, hooks * size)
    kind = "peagle" if parallel else "eagle3"
    method = {"method": "eagle3"} | ({"parallel_drafting": True} if parallel else {})
    return Head(_config(kind, target, layers, own), tensors, method)


def dflash(target: TargetShape) -> Head:
    own = {"mask_token_id": MASK_TOKEN, "aux_hidden_state_layer_ids": target.hooks(5)}
    return Head(_config("dflash", target, 5, own), _dflash_tensors(target), {"method": "dflash"})


def dspark(target: TargetShape) -> Head:
    size, rank = target.hidden_size, min(MARKOV_RANK, target.hidden_size)
    own = {
        "mask_token_id": MASK_TOKEN, "aux_hidden_state_layer_ids": target.hooks(5),
        "markov_rank": rank, "markov_head_type": "vanilla", "block_size": 7,
        "sample_from_anchor": True, "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }  # fmt: skip
    tensors = _dflash_tensors(target) | {
        "markov_head.markov_w1.weight": (target.vocab_size, rank),
        "markov_head.markov_w2.weight": (target.vocab_size, rank),
        "confidence_head.proj.weight": (1, size + rank),
        "confidence_head.proj.bias": (1,),
    }
    return Head(_config("dspark", target, 5, own), tensors, {"method": "dspark"})


def _dflash_tensors(target: TargetShape) -> Shapes:
    size = target.hidden_size
    tensors: Shapes = {"fc.weight": (size, 5 * size), "hidden_norm.weight": (size,)}
    for layer in range(5):
        tensors |= decoder_layer(f"layers.{layer}", target, size)
    return tensors | {"norm.weight": (size,)}


def _config(kind: str, target: TargetShape, layers: int, own: dict[str, Any]) -> dict[str, Any]:
    """A head's `config.json` in the speculators format, which vLLM reads."""
    layer = target.layer_config() | {"num_hidden_layers": layers, "tie_word_embeddings": False}
    return {
        "speculators_model_type": kind,
        "architectures": [kind],
        "dtype": "bfloat16",
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": target.name, "architectures": ["Qwen3ForCausalLM"]},
        },
        **own,
    }


# By name; SpecFormer's own heads are written by `checkpoints`, from its own classes.
OTHERS = {"eagle3": eagle3, "peagle": peagle, "dflash": dflash, "dspark": dspark}
