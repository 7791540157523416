"""Targets are asked by running them; what cannot be trained for is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma4TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeTextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Starcoder2Config,
)

from support.family_targets import make_target
from vllm_specformer.target.ends import logit_changes
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import (
    UnsupportedTargetError,
    auto_class,
    can_pack,
    check_decoder,
    check_parts,
    head_config,
    load_target,
    read_target_config,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral-sliding": MistralConfig(**SHAPE, sliding_window=6),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2,
                                moe_intermediate_size=16, decoder_sparse_step=1),
}  # fmt: skip


def hooked(config: Any) -> HookedTarget:
    torch.manual_seed(0)
    return HookedTarget(AutoModelForCausalLM.from_config(config), (0, 2, 3, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass_and_pack(family: str) -> None:
    target = hooked(FAMILIES[family])
    check_parts(target, "t")
    assert can_pack(target)


class _Deaf(nn.Module):
    """A decoder that takes no notice of positions, as one with masks of its own would."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.inner, self.layers, self.norm = decoder, decoder.layers, decoder.norm

    def forward(self, input_ids: Any, position_ids: Any = None, use_cache: bool = False) -> Any:
        return self.inner(input_ids=input_ids, use_cache=False)


class _Strict(_Deaf):
    """A decoder that does not know positions at all."""

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:  # type: ignore[override]
        return self.inner(input_ids=input_ids, use_cache=False)


@pytest.mark.parametrize("kind", [_Deaf, _Strict])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_see_each_other_are_noticed(family: str, kind: type[_Deaf]) -> None:
    target = hooked(FAMILIES[family])
    target.decoder = kind(target.decoder)
    assert not can_pack(target)
    assert not target._states


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (Gemma2Config(**SHAPE, final_logit_softcapping=3.0), (3.0, 1.0)),
        (GraniteConfig(**SHAPE, logits_scaling=8.0), (0.0, 0.125)),
        (CohereConfig(**SHAPE, logit_scale=0.5), (0.0, 0.5)),
        (GraniteConfig(**SHAPE, embedding_multiplier=12.0), (0.0, 1.0)),
    ],
    ids=["softcapped", "divided", "multiplied", "scaled-embedding"],
)
def test_scales_and_caps_are_reproduced(config: Any, changes: tuple[float, float]) -> None:
    target = hooked(config)
    assert logit_changes(config) == changes
    check_parts(target, "t")
    target._softcap, target._scale = 0.0, 1.0
    if changes != (0.0, 1.0):
        with pytest.raises(UnsupportedTargetError, match="does something more"):
            check_parts(target, "t")


def test_other_changes_of_the_logits_are_refused() -> None:
    target = hooked(FAMILIES["llama"])
    target.target.register_forward_hook(lambda *call: _with_logits(call[-1], call[-1].logits ** 3))
    with pytest.raises(UnsupportedTargetError, match="does something more"):
        check_parts(target, "t")


def _with_logits(output: Any, logits: Any) -> Any:
    output.logits = logits
    return output


def test_an_embedding_with_something_added_is_refused() -> None:
    target = hooked(FAMILIES["llama"])
    target.decoder.embed_tokens.register_forward_hook(lambda *call: call[-1] + 0.01)
    with pytest.raises(UnsupportedTargetError, match="does not read the embedding"):
        check_parts(target, "t")


def test_unsuitable_configurations_are_refused() -> None:
    with pytest.raises(UnsupportedTargetError, match=r"MambaConfig.*has no 'num_attention_heads'"):
        head_config("default", MambaConfig(), "mamba")
    shallow = LlamaConfig(**(SHAPE | {"num_hidden_layers": 3}))
    with pytest.raises(UnsupportedTargetError, match="target small: num_hidden_layers=3"):
        head_config("default", shallow, "small")
    with pytest.raises(UnsupportedTargetError, match=r"aux_hidden_state_layer_ids=\[0, 9\]"):
        head_config("default", FAMILIES["llama"], "t", aux_hidden_state_layer_ids=(0, 9))


def test_shapes_of_unusual_configurations() -> None:
    """Layers that differ, mixtures without a dense layer, norms of another kind."""
    gemma = head_config("default", Gemma4TextConfig(num_hidden_layers=6), "gemma")
    assert (gemma.head_dim, gemma.num_key_value_heads) == (256, 4)  # not the 512 of full attention
    assert gemma.rope_theta == 1e6  # but its base
    moe = head_config("default", Qwen3_5MoeTextConfig(), "moe")
    assert moe.intermediate_size == 512 * 8
    assert head_config("default", Starcoder2Config(), "sc").rms_norm_eps == 1e-5


def test_what_vllm_cannot_serve_is_refused() -> None:
    cohere = CohereConfig(**SHAPE, architectures=["CohereForCausalLM"])
    message = (
        r"target c: vLLM .* serves CohereForCausalLM with a class \(commandr:CohereForCausalLM\)"
    )
    with pytest.raises(UnsupportedTargetError, match=message):
        head_config("default", cohere, "c")
    starcoder = Starcoder2Config(architectures=["Starcoder2ForCausalLM"])
    with pytest.raises(
        UnsupportedTargetError, match=r"hands out no hidden state 0; train .* --hooks 1,15,29,30"
    ):
        head_config("default", starcoder, "s", aux_hidden_state_layer_ids=(0, 15, 29, 30))
    sparse = DeepseekV3Config(architectures=["DeepseekV32ForCausalLM"])
    with pytest.raises(
        UnsupportedTargetError, match=r"no hidden state 0 and 61; train .* --hooks 1,30,59,60"
    ):
        head_config("default", sparse, "d", aux_hidden_state_layer_ids=(0, 30, 60, 61))


@pytest.mark.parametrize(
    ("config", "hooks"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), [0, 16, 31, 32]),
        (Starcoder2Config(architectures=["Starcoder2ForCausalLM"]), [1, 15, 29, 30]),
        (DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]), [1, 30, 60, 61]),
        (DeepseekV3Config(architectures=["DeepseekV32ForCausalLM"]), [1, 30, 59, 60]),
        (LlamaConfig(architectures=["Unheard"]), [0, 16, 31, 32]),
    ],
)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_default_hooks_are_handed_out(
    preset: str, config: PreTrainedConfig, hooks: list[int]
) -> None:
    assert head_config(preset, config, "t").aux_hidden_state_layer_ids == hooks


def test_positions_in_several_dimensions() -> None:
    """The target gets positions of its own making; texts of one row stay apart."""
    target = make_target("qwen3-vl")
    config = head_config("default", target.config, "q")
    assert (config.hidden_size, config.target_num_layers, config.vocab_size) == (64, 4, 331)
    hooked = HookedTarget(target, config.aux_hidden_state_layer_ids)
    check_parts(hooked, "q")
    assert can_pack(hooked)


@pytest.mark.parametrize(
    ("config", "architecture", "built"),
    [
        (Qwen3Config(), "Qwen3ForCausalLM", AutoModelForCausalLM),
        (Qwen3VLConfig(), "Qwen3VLForConditionalGeneration", AutoModelForMultimodalLM),
        (Qwen3_5Config(), "Qwen3_5ForConditionalGeneration", AutoModelForMultimodalLM),
        (Qwen3_5Config(), "Qwen3_5ForCausalLM", AutoModelForCausalLM),
        (Qwen3_5Config(), None, AutoModelForCausalLM),
        (Qwen3Config(), "Unheard", AutoModelForCausalLM),
    ],
)
def test_what_a_target_is_built_as(
    config: PreTrainedConfig, architecture: str | None, built: Any
) -> None:
    assert auto_class(config, architecture) is built
    config.architectures = architecture and [architecture]
    assert auto_class(config) is built


def test_decoders_that_keep_their_parts_elsewhere() -> None:
    shape = {**SHAPE, "layer_norm_eps": 1e-5}
    del shape["head_dim"]
    target = hooked(GPTNeoXConfig(**shape))
    check_parts(target, "neox")
    bloom = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=32, n_layer=4, n_head=4))
    check_decoder(bloom, "bloom")
    del bloom.transformer.h
    with pytest.raises(UnsupportedTargetError, match="BloomModel has none of: layers"):
        check_decoder(bloom, "bloom")


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of", "architectures": ["X"]}')
    with pytest.raises(UnsupportedTargetError, match="cannot read its configuration"):
        read_target_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    with pytest.raises(UnsupportedTargetError, match="cannot load it as a language model"):
        load_target(tmp_path, torch.float32, torch.device("cpu"))
