"""Quantised targets: unpacked for training, or refused by what is missing before they load."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.quantised import SCHEMES, quantise, write_description
from vllm_specformer.target import quantised
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import can_pack, check_parts, check_trainable, load_target
from vllm_specformer.target.unsupported import UnsupportedTargetError

ON_CPU = (torch.float32, torch.device("cpu"))
INSTEAD = r"or distil and train with the checkpoint it was quantised from: .* fits this one$"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_unpacked(scheme: str, plain: Path, tmp_path: Path) -> None:
    """Training calls the decoder inside, past hooks of the outermost module that unpack weights."""
    directory = tmp_path / "target"
    meant = quantise(plain, directory, scheme)
    check_trainable(directory)
    model = load_target(directory, *ON_CPU)
    found = model.state_dict()
    assert len(meant) == 4 * 7
    for name, weight in meant.items():
        torch.testing.assert_close(found[name], weight)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    target = HookedTarget(model, (0, 2, 3, 4))
    check_parts(target, "quantised")
    assert can_pack(target)


def test_groups_in_any_order(plain: Path, tmp_path: Path) -> None:
    """GPTQ with activation order keeps a group for each input, and may keep zeros as they are."""
    directory = tmp_path / "target"
    quantise(plain, directory, "gptq")
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(directory / "model.safetensors")
    groups = torch.tensor([1, 0]).repeat(len(tensors[f"{name}.g_idx"]) // 2).to(torch.int32)
    tensors[f"{name}.g_idx"] = groups
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_target(directory, *ON_CPU)
    words = tensors[f"{name}.qweight"].T
    numbers = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1)
    scales = tensors[f"{name}.scales"].float()
    meant = (numbers - 8) * scales[groups.long()].T
    torch.testing.assert_close(model.state_dict()[f"{name}.weight"], meant)

    described = SCHEMES["gptq"][1]
    write_description(directory, described | {"checkpoint_format": "gptq_v2"})
    model = load_target(directory, *ON_CPU)
    meant = (numbers - 7) * scales[groups.long()].T
    torch.testing.assert_close(model.state_dict()[f"{name}.weight"], meant)


def test_tensors_that_are_missing(plain: Path, tmp_path: Path) -> None:
    directory = tmp_path / "target"
    quantise(plain, directory, "awq")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.scales"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedTargetError, match=r"down_proj has .* of qweight, qzeros, sca"):
        load_target(directory, *ON_CPU)
    tensors = load_file(plain / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(plain / "config.json", directory / "config.json")
    with pytest.raises(UnsupportedTargetError, match=r"its files lack model\.layers\.1.*down_proj"):
        load_target(directory, *ON_CPU)


@pytest.fixture
def described(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], str]:
    """What a target with such a description is refused with, asked both ways, without weights."""

    def refused(description: dict[str, Any]) -> str:
        directory = shutil.copytree(plain, tmp_path / "described")
        write_description(directory, description)
        monkeypatch.setattr(
            AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights loaded")
        )
        with pytest.raises(UnsupportedTargetError) as early:
            check_trainable(directory)
        with pytest.raises(UnsupportedTargetError) as late:
            load_target(directory, *ON_CPU)
        assert str(early.value) == str(late.value)
        assert "\n" not in str(late.value)
        return str(late.value)

    return refused


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("gptq", {"bits": 3}),
        ("awq", {"bits": 4, "version": "gemv"}),
        ("bitsandbytes", {}),
        ("compressed-tensors", {}),
    ],
)
def test_missing_packages_are_named_together(
    method: str,
    more: dict[str, Any],
    described: Callable[[dict[str, Any]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    packages = [entry.partition(":")[0] for entry in quantised._PACKAGES[method]]
    message = described({"quant_method": method} | more)
    assert f"its weights are quantised ({method})" in message
    assert f"without {' and '.join(packages)}; pip install {' '.join(packages)}, take" in message
    assert re.search(INSTEAD, message)


def test_unknown_methods(described: Callable[[dict[str, Any]], str]) -> None:
    message = described({"quant_method": "unheard-of"})
    assert "its weights are quantised (unheard-of)" in message
    assert "it knows aqlm, auto-round, awq" in message
    assert re.search(INSTEAD, message)


def test_what_transformers_says_is_told(described: Callable[[dict[str, Any]], str]) -> None:
    """It wants a GPU for this one, or a package."""
    message = described({"quant_method": "eetq"})
    assert re.search(
        r"cannot unpack them here \(.*(GPU|eetq|kernels).*\); mend that, take", message
    )


def test_a_quantised_embedding(plain: Path, tmp_path: Path) -> None:
    directory = tmp_path / "target"
    quantise(plain, directory, "w4a16")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight_packed"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedTargetError, match=r"its embedding among them.*quantise it"):
        check_trainable(directory)
    with pytest.raises(UnsupportedTargetError, match=r"its embedding among them.*quantise it"):
        load_target(directory, *ON_CPU)
