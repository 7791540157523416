"""Muon for matrices, AdamW for everything else, under one trapezoidal schedule."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizers(
    model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float = 0.01
) -> list[torch.optim.Optimizer]:
    """Split trainable parameters into Muon (hidden 2-D weights) and AdamW (the rest).

    Embeddings and output heads are two-dimensional but not matrices in Muon's sense (their rows
    are looked up or scored one by one), so they go to AdamW, as do vectors.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = "embed" in name or "lm_head" in name
        (matrices if parameter.ndim == 2 and not is_table else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def trapezoid(step: int, total: int, warmup: int, decay_fraction: float) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear decay to 0 at `total`.

    The constant part does not depend on `total`, so a run may be shortened or lengthened from any
    checkpoint taken before the decay began and still equals a run planned that way.
    """
    decay_steps = max(1, int(total * decay_fraction))
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (total - step) / decay_steps))


def set_factor(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's learning rate to `factor` times its initial value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
