"""Checkpoints of GPTQ and AWQ as plain weights, so that training needs no package of theirs.

The engine multiplies by the weights that the packed numbers stand for, `(q - zero) * scale`; these
are the same weights, so the states a head is trained on are those it is served with.

Source: Frantar et al. (arXiv 2210.17323) and Lin et al. (arXiv 2306.00978); the layouts are those
of the packages GPTQModel and AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_WORD = 32  # bits
# AWQ lays eight columns into a word in this order.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def obstacle(described: Mapping[str, Any]) -> str:
    """Why a checkpoint with this description cannot be unpacked here; empty if it can.

    Args:
        described: `quantization_config` of the target's configuration.
    """
    method, bits = described.get("quant_method"), described.get("bits")
    if method == "gptq":
        if bits not in (2, 4, 8):
            return f"bits={bits} are laid out in another way than 2, 4 and 8"
        form = described.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            return f"checkpoint_format={form!r} is neither 'gptq' nor 'gptq_v2'"
        return "layers differ ('dynamic')" if described.get("dynamic") else ""
    if method == "awq":
        version = str(described.get("version") or "gemm").lower()
        if (bits, version) != (4, "gemm"):
            return f"bits={bits} and version={version!r} are not 4 and 'gemm'"
        return ""
    return "only GPTQ and AWQ can"


def read_unpacked(
    directory: Path,
    described: Mapping[str, Any],
    dtype: torch.dtype,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with weights in the place of what they are packed into.

    Args:
        described: as in `obstacle`, which must have found none.
        dtype: of the weights.
        wanted: which of the files' tensors to read, by name.

    Raises:
        ValueError: a part of a packed weight is missing.
    """
    tensors: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in filter(wanted, file.keys()):
                layer, _, part = name.rpartition(".")
                if part not in _PARTS:
                    tensors[name] = file.get_tensor(name)
                    continue
                parts = packed.setdefault(layer, {})
                parts[part] = file.get_tensor(name)
                if _is_whole(parts, described):
                    tensors[f"{layer}.weight"] = _weight(packed.pop(layer), described, dtype)
    # A file may leave out the groups of GPTQ's inputs, where they follow one another.
    for layer, parts in packed.items():
        if parts.keys() != set(_PARTS[:3]):
            raise ValueError(f"{layer} has {sorted(parts)} of {', '.join(_PARTS[:3])}")
        tensors[f"{layer}.weight"] = _weight(parts, described, dtype)
    return tensors


def _is_whole(parts: Mapping[str, Tensor], described: Mapping[str, Any]) -> bool:
    wanted = _PARTS if described["quant_method"] == "gptq" else _PARTS[:3]
    return parts.keys() == set(wanted)


def _weight(
    parts: Mapping[str, Tensor], described: Mapping[str, Any], dtype: torch.dtype
) -> Tensor:
    """The weight [out, in] that the parts stand for.

    `qweight` int32 [in / n, out] (GPTQ) or [in, out / n] (AWQ), where n numbers fill a word;
    `qzeros` int32 [groups, out / n], `scales` [groups, out], `g_idx` int32 [in], the group of each
    input.
    """
    bits = int(described["bits"])
    scales = parts["scales"].float()
    if described["quant_method"] == "awq":
        order = torch.tensor(_AWQ_ORDER)
        numbers = _columns(parts["qweight"], bits, order)
        zeros = _columns(parts["qzeros"], bits, order)
    else:
        numbers = _columns(parts["qweight"].T, bits).T
        zeros = _columns(parts["qzeros"], bits)
        if described.get("checkpoint_format") != "gptq_v2":
            zeros = (zeros + 1) & ((1 << bits) - 1)  # the first format keeps them less one
    groups = parts.get("g_idx")
    if groups is None:
        inputs = len(numbers)
        groups = torch.arange(inputs) // -(-inputs // len(scales))
    groups = groups.long()
    weight = (numbers - zeros[groups]) * scales[groups]
    return weight.T.to(dtype).contiguous()


def _columns(words: Tensor, bits: int, order: Tensor | None = None) -> Tensor:
    """Numbers that lie side by side in words int32 [rows, n]: int32 [rows, n * 32 / bits].

    Args:
        order: which column the i-th lowest number of a word belongs to; none: the i-th.
    """
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    if order is not None:
        numbers = numbers[..., order.argsort()]
    return numbers.flatten(-2)
