"""Plain data parallelism: average the gradients of all processes, then clip their norm."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def join_group() -> tuple[int, int]:
    """Rank and number of processes; joins the process group when started by torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    return rank, world


def average_gradients(parameters: Iterable[nn.Parameter], world: int, max_norm: float) -> float:
    """Average over `world` processes and clip to `max_norm`; returns the norm before clipping."""
    with_grad = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in with_grad if p.grad is not None])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    norm = float(flat.norm())
    flat *= min(1.0, max_norm / (norm + 1e-6))
    for p, part in zip(with_grad, flat.split([p.numel() for p in with_grad]), strict=True):
        assert p.grad is not None
        p.grad.copy_(part.view_as(p))
    return norm
