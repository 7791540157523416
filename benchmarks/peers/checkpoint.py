"""One of the library's heads in training, in one file: weights, optimizers, counts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

Counts = dict[str, float]
_MODEL, _OPTIMIZER = "model", "optimizer"


def save(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], counts: Counts
) -> None:
    """Write what is trained; the file is whole or the one before."""
    tensors = {
        f"{_MODEL} {name}": p.data for name, p in model.named_parameters() if p.requires_grad
    }
    for number, optimizer in enumerate(optimizers):
        for place, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"{_OPTIMIZER} {number} {place} {name}"] = torch.as_tensor(value)
    half = path.with_suffix(".partial")
    half.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, half, {"counts": json.dumps(counts)})
    os.replace(half, path)


def load(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Counts | None:
    """Go on from there; None if there is no such file."""
    if not path.is_file():
        return None
    weights = dict(model.named_parameters())
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    with safe_open(path, "pt") as file:
        for key in file.keys():
            kind, *rest = key.split(" ")
            if kind == _MODEL:
                weights[rest[0]].data.copy_(file.get_tensor(key))
            else:
                number, place, name = int(rest[0]), int(rest[1]), rest[2]
                states[number].setdefault(place, {})[name] = file.get_tensor(key)
        counts: Counts = json.loads(file.metadata()["counts"])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return counts
