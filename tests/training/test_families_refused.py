"""`specformer train` refuses a family that vLLM cannot serve a head with, before weights load."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, CohereConfig, Olmo2Config, PreTrainedConfig

from support.training_runs import command, refusal
from support.training_texts import make_texts, write_distilled
from vllm_specformer.training import states as run

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_pair(folder: Path, config: PreTrainedConfig) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "target")
    write_distilled(folder / "data", make_texts(20, 40), folder / "target")
    return folder


def test_refused_before_weights_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_target", lambda *_: pytest.fail("the weights were loaded"))
    cohere = make_pair(tmp_path / "cohere", CohereConfig(**SHAPE))
    message = refusal(capsys, command(cohere, tmp_path / "out1"))
    assert "CohereForCausalLM" in message
    assert "cannot return hidden states" in message
    olmo = make_pair(tmp_path / "olmo", Olmo2Config(**SHAPE))
    message = refusal(capsys, command(olmo, tmp_path / "out2", hooks="0,2,3,4"))
    assert "--hooks 1,2,3,4" in message
