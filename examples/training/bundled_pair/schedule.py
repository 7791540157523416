"""Learning rates of the target's training."""

from __future__ import annotations

import torch


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
