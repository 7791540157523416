"""Training checkpoints without pickle: weights and optimiser state in one safetensors file.

A checkpoint is written beside its final name and renamed, so a kill at any moment leaves either
the previous checkpoint or the new one, never half of one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def _optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{number}.{index}.{name}"] = torch.as_tensor(value).contiguous()
    return tensors


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """Write trainable weights, optimiser state and the number of finished steps to `path`."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    tensors |= _optimizer_tensors(optimizers)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    os.replace(partial, path)


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Restore what `save_checkpoint` wrote; returns the number of finished steps."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        parameters = dict(model.named_parameters())
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
        for key in file.keys():
            kind, rest = key.split(".", 1)
            if kind == "model":
                with torch.no_grad():
                    parameters[rest].copy_(file.get_tensor(key))
            else:
                number, index, name = rest.split(".", 2)
                states[int(number)].setdefault(int(index), {})[name] = file.get_tensor(key)
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step
