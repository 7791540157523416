"""Embedding, final norm and lm_head alone are those of the whole target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.family_targets import FAMILIES
from support.quantised import SCHEMES, quantise
from vllm_specformer.target.ends import TargetEnds, find_decoder
from vllm_specformer.target.model import auto_class, load_target
from vllm_specformer.target.unsupported import UnsupportedTargetError
from vllm_specformer.target.without_layers import count_parameters, load_ends

ON_CPU = (torch.float32, torch.device("cpu"))


def assert_same_ends(directory: Path) -> None:
    whole = load_target(directory, *ON_CPU)
    alone = load_ends(directory, *ON_CPU)
    assert len(find_decoder(alone).layers) == 0
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    one, other = TargetEnds(whole, (0,)), TargetEnds(alone, (0,))
    states = torch.randn(3, whole.config.get_text_config().hidden_size)
    tokens = torch.arange(5)
    torch.testing.assert_close(other.logits(states), one.logits(states), rtol=0, atol=0)
    torch.testing.assert_close(other.embed(tokens), one.embed(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Quantised layers and others are not even looked at."""
    tiny = FAMILIES[family]
    config = tiny.config()
    torch.manual_seed(0)
    model = auto_class(config, tiny.architecture).from_config(config)
    for parameter in model.parameters():  # a norm's weights are 1 in a new model
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    assert_same_ends(tmp_path)
    assert count_parameters(tmp_path) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_layers(scheme: str, plain: Path, tmp_path: Path) -> None:
    directory = tmp_path / "target"
    quantise(plain, directory, scheme)
    assert_same_ends(directory)


def test_a_method_that_cannot_be_unpacked_here(plain: Path, tmp_path: Path) -> None:
    """Its layers are not needed."""
    directory = tmp_path / "target"
    shutil.copytree(plain, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (directory / "config.json").write_text(json.dumps(config))
    alone = load_ends(directory, *ON_CPU)
    expected = load_file(plain / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(alone.get_output_embeddings().weight.data, expected)


def test_a_file_without_an_lm_head(plain: Path, tmp_path: Path) -> None:
    directory = tmp_path / "target"
    shutil.copytree(plain, directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedTargetError, match=r"lack lm_head\.weight; copy or download"):
        load_ends(directory, *ON_CPU)
