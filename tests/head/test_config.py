"""Head configuration: presets, round trips, and refusals that name field, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig, Qwen3Config

from vllm_specformer.config import ARCHITECTURE, SpecFormerConfig, paper_hooks, read_head_config
from vllm_specformer.head_fields import MAX_SLOT_LAYERS, MAX_SLOTS, HeadConfigError, HeadFields


def target(**changes: Any) -> PreTrainedConfig:
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "architectures": ["Qwen3ForCausalLM"],
    }
    return Qwen3Config(**(fields | changes))


def head(**changes: Any) -> SpecFormerConfig:
    return SpecFormerConfig.preset("default", target(), "some/target", **changes)


def fields_of(config: SpecFormerConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in HeadFields.model_fields}


def test_preset_takes_the_shape_of_the_target() -> None:
    config = head()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (50, 32, 48)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 5000.0)
    assert config.max_position_embeddings == 64
    assert (config.target_architecture, config.target_num_layers) == ("Qwen3ForCausalLM", 6)
    assert config.target_name_or_path == "some/target"


def test_presets_differ_in_what_the_slots_see() -> None:
    paper = SpecFormerConfig.preset("paper", target(), "t")
    assert (paper.use_bonus_embedding, paper.slot_mask, paper.markov_rank) == (False, "slots", 0)
    default = head()
    assert (default.use_bonus_embedding, default.slot_mask) == (True, "mixed")


def test_changes_override_a_preset() -> None:
    assert head(num_draft_slots=3, markov_rank=7).num_draft_slots == 3
    assert head(num_draft_slots=3, markov_rank=7).markov_rank == 7


def test_unknown_preset() -> None:
    with pytest.raises(HeadConfigError, match=r"preset='best' is unknown; choose one of .*paper"):
        SpecFormerConfig.preset("best", target(), "t")


@pytest.mark.parametrize(
    ("layers", "hooks"), [(4, (0, 2, 3, 4)), (5, (0, 2, 4, 5)), (36, (0, 18, 35, 36))]
)
def test_hooks_of_the_paper(layers: int, hooks: tuple[int, ...]) -> None:
    assert paper_hooks(layers) == hooks


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_shallow_target_is_refused(layers: int) -> None:
    with pytest.raises(HeadConfigError, match=rf"num_hidden_layers={layers}.*at least 4.*choose"):
        SpecFormerConfig.preset("default", target(num_hidden_layers=layers), "t")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"markov_rank": 4, "num_draft_slots": 1},
        {"num_slot_layers": 2, "draft_vocab_size": 50},
        {"num_draft_slots": 3, "tree_ranking": (0.7, 0.85, 1.0)},
        {"context_window": 1024, "context_sinks": 4},
        {"num_draft_slots": 2, "acceptance_calibration": (0.9, 0.1, -0.2)},
    ],
)
def test_survives_saving(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = head(**changes)
    config.save_pretrained(tmp_path)
    assert fields_of(SpecFormerConfig.from_pretrained(tmp_path)) == fields_of(config)
    assert fields_of(read_head_config(tmp_path)) == fields_of(config)
    assert fields_of(SpecFormerConfig.from_dict(config.to_dict())) == fields_of(config)


def test_file_states_every_field_once(tmp_path: Path) -> None:
    head().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == [ARCHITECTURE]
    assert content["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    layer = content["transformer_layer_config"]
    stated = (content.keys() | layer.keys() | {"target_name_or_path"}) & set(
        HeadFields.model_fields
    )
    assert stated == set(HeadFields.model_fields)
    assert not layer.keys() & content.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_draft_slots": 0}, r"'num_draft_slots' with value 0.*greater than or equal to 1"),
        ({"num_draft_slots": MAX_SLOTS + 1}, r"'num_draft_slots' with value 65.*less than or"),
        ({"head_dim": 7}, r"'head_dim' with value 7.*multiple of 2"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"slot_mask": "causal"}, r"'slot_mask' with value 'causal'.*'slots' or 'mixed'"),
        ({"markov_rank": -1}, r"'markov_rank' with value -1"),
        ({"num_slot_layers": 0}, r"'num_slot_layers' with value 0"),
        ({"num_slot_layers": MAX_SLOT_LAYERS + 1}, r"'num_slot_layers' with value 9"),
        ({"context_window": -1}, r"'context_window' with value -1"),
        ({"context_sinks": 4}, r"context_sinks=4 needs a context_window"),
        ({"draft_vocab_size": -1}, r"'draft_vocab_size' with value -1"),
        ({"draft_vocab_size": 51}, r"draft_vocab_size=51 must be at most vocab_size=50"),
        ({"tree_ranking": [1.0] * 7}, r"must have num_draft_slots=8 temperatures, one per slot"),
        (
            {"tree_ranking_sampled": [1.0] * 7},
            r"tree_ranking_sampled=\[.*\] must have num_draft_slots=8",
        ),
        ({"tree_ranking": [1.0] * 7 + [0]}, r"0\.0\] must lie in 0\.01\.\.100; 1 leaves scores"),
        ({"tree_ranking": [1.0] * 7 + [float("nan")]}, r"'tree_ranking\.7' with value nan"),
        (
            {"acceptance_calibration": [1.0] * 8},
            r"must have a slope and num_draft_slots=8 intercepts, one per slot, or nothing",
        ),
        (
            {"acceptance_calibration_sampled": [0.0] * 9},
            r"_sampled=\[.*\] must have a slope above 0 and nothing beyond 100",
        ),
        ({"acceptance_calibration": [1.0] * 8 + [1e3]}, r"must have a slope above 0 and nothing"),
        ({"rope_theta": 0}, r"'rope_theta' with value 0"),
        ({"aux_hidden_state_layer_ids": []}, r"'aux_hidden_state_layer_ids' with value \[\]"),
        (
            {"aux_hidden_state_layer_ids": [0, 5, 3]},
            r"aux_hidden_state_layer_ids=\[0, 5, 3\] must be strictly increasing",
        ),
        ({"aux_hidden_state_layer_ids": [3, 3]}, r"=\[3, 3\] must be strictly increasing"),
        ({"aux_hidden_state_layer_ids": [0, 7]}, r"=\[0, 7\] must lie in 0\.\.6"),
        ({"aux_hidden_state_layer_ids": [-1, 2]}, r"=\[-1, 2\] must lie in 0\.\.6"),
        ({"target_num_layers": 3}, r"'target_num_layers' with value 3"),
        ({"dropout": 0.1}, r"'dropout' with value 0\.1 is unknown; remove it or install"),
    ],
)
def test_bad_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadConfigError, match=message):
        head(**changes)


OPTIONAL = {name for name, field in HeadFields.model_fields.items() if not field.is_required()}


@pytest.mark.parametrize("name", sorted(HeadFields.model_fields.keys() - OPTIONAL))
def test_missing_field_is_named(name: str) -> None:
    fields = fields_of(head())
    del fields[name]
    with pytest.raises(HeadConfigError, match=f"field '{name}' is missing; add it"):
        SpecFormerConfig(**fields)


def test_files_without_later_fields_are_read(tmp_path: Path) -> None:
    """Heads written before a field was there are what they were."""
    later = {"num_slot_layers", "draft_vocab_size", "tree_ranking", "tree_ranking_sampled"}
    later |= {"context_window", "context_sinks", "markov_gate"}
    later |= {"acceptance_calibration", "acceptance_calibration_sampled"}
    assert later == OPTIONAL
    config = read_head_config(edited(tmp_path, **dict.fromkeys(OPTIONAL)))
    assert fields_of(config) == fields_of(head())


def edited(tmp_path: Path, **changes: Any) -> Path:
    """A head's config.json with top-level entries replaced; None removes one."""
    head().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculators_model_type": "eagle3"}, "is 'eagle3', expected 'specformer'"),
        ({"speculators_model_type": None}, "is None, expected 'specformer'"),
        ({"transformer_layer_config": None}, "'transformer_layer_config' is missing"),
        ({"transformer_layer_config": {}}, "'vocab_size' is missing"),
        ({"speculators_config": None}, "'target_name_or_path' is missing"),
        ({"slot_mask": None}, "'slot_mask' is missing"),
        ({"temperature": 1}, "'temperature' with value 1 is unknown"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadConfigError, match=message) as error:
        read_head_config(edited(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(error.value)


def test_absent_and_broken_file(tmp_path: Path) -> None:
    with pytest.raises(HeadConfigError, match=r"config\.json is missing; 'model' must name"):
        read_head_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(HeadConfigError, match=r"config\.json: not valid JSON"):
        read_head_config(tmp_path)
