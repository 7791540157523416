"""Quantised copies of a small target, rounded to nearest, in the formats that people publish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
_ROUNDED = {"type": "int", "symmetric": True}
# A weight's name without ".weight" -> tensors under their names in the checkpoint, and the weight
# they stand for.
Rounded = tuple[dict[str, Tensor], Tensor]


def _eight(name: str, weight: Tensor) -> Rounded:
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round()
    tensors = {f"{name}.weight": rounded.to(torch.int8), f"{name}.weight_scale": scale}
    return tensors, rounded * scale


def _grouped(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers -8..7 [out, in] and their scales [out, groups]."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2, keepdim=True) / 7
    return (groups / scale).round().clamp(-8, 7).flatten(1), scale.squeeze(2)


def _four(name: str, weight: Tensor) -> Rounded:
    rounded, scale = _grouped(weight)
    tensors = {
        f"{name}.weight_packed": pack_to_int32(rounded.to(torch.int8), 4),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(list(weight.shape)),
    }
    return tensors, rounded * scale.repeat_interleave(GROUP, 1)


def _words(numbers: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """Whole numbers 0..15 [rows, n] in words int32 [rows, n / 8], the order-th column lowest."""
    columns = numbers.to(torch.int64).unflatten(1, (-1, 8))[..., list(order)]
    words = (columns << torch.arange(0, 32, 4)).sum(-1)
    return words.where(words < 1 << 31, words - (1 << 32)).to(torch.int32)


def _gptq(name: str, weight: Tensor) -> Rounded:
    rounded, scale = _grouped(weight)
    scale = scale.half().float()
    order = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    tensors = {
        f"{name}.qweight": _words(rounded + 8).T,
        f"{name}.qzeros": _words(torch.full(scale.T.shape, 7)),  # kept less one
        f"{name}.scales": scale.T.half(),
        f"{name}.g_idx": order,
    }
    return tensors, rounded * scale.repeat_interleave(GROUP, 1)


def _awq(name: str, weight: Tensor) -> Rounded:
    """Unlike the others with zeros that differ, as the least of each group is 0."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    numbers = ((groups / scale.unsqueeze(2)).round() + zero.unsqueeze(2)).clamp(0, 15)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        f"{name}.qweight": _words(numbers.flatten(1).T, order),
        f"{name}.qzeros": _words(zero.T, order),
        f"{name}.scales": scale.T.half(),
    }
    return tensors, ((numbers - zero.unsqueeze(2)) * scale.unsqueeze(2)).flatten(1)


def _compressed(form: str, bits: int, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "dynamic": False, **_ROUNDED, **weights},
        **more,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_ACTIVATIONS = {"num_bits": 8, "strategy": "token", "dynamic": True, **_ROUNDED}
SCHEMES: dict[str, tuple[Callable[[str, Tensor], Rounded], dict[str, Any]]] = {
    "w8a8": (
        _eight,
        _compressed("int-quantized", 8, {"strategy": "channel"}, input_activations=_ACTIVATIONS),
    ),
    "w4a16": (
        _four,
        _compressed("pack-quantized", 4, {"strategy": "group", "group_size": GROUP}),
    ),
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": (
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
}


def quantise(source: Path, out: Path, scheme: str) -> dict[str, Tensor]:
    """Write a copy of `source` with quantised layers.

    Returns:
        The weights that the quantised ones stand for, by name, float32.
    """
    pack, described = SCHEMES[scheme]
    shutil.copytree(source, out)
    tensors, meant = load_file(out / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        packed, weight = pack(name.removesuffix(".weight"), tensors.pop(name).float())
        tensors |= packed
        meant[name] = weight
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    write_description(out, described)
    return meant


def write_description(directory: Path, described: dict[str, Any]) -> None:
    """Set `quantization_config` in a target's configuration."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": described}))
