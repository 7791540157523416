"""Muon for matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_specformer.training.float32_muon import Float32Muon, loss_of

ADAMW_BETAS = (0.9, 0.95)


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by itself; without, float32 is faster."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as matrices, for Muon, and the rest.

    Embeddings and output heads are two-dimensional but not matrices in Muon's sense (their rows
    are looked up or scored one by one), nor is a stack of scale vectors; they belong to the rest.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        stack = any(part in name for part in ("embed", "lm_head", "norm"))
        (matrices if parameter.ndim == 2 and not stack else rest).append(parameter)
    return matrices, rest


def build_optimizers(
    model: nn.Module,
    muon_lr: float,
    adamw_lr: float,
    weight_decay: float = 0.01,
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and AdamW for the rest, as two optimisers."""
    matrices, rest = split_parameters(model)
    emulated = matrices[0].device.type == "cpu" and not cpu_has_bfloat16()
    kind = Float32Muon if emulated else torch.optim.Muon
    return [
        kind(matrices, lr=muon_lr, momentum=0.95, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=adamw_lr, betas=ADAMW_BETAS, weight_decay=0.0),
    ]


class MuonAdamW(torch.optim.Optimizer):
    """The two as one optimiser, which schedulers, checkpoints and the Trainer know how to treat.

    Groups and states are its own; the two see just their part of them.
    """

    def __init__(
        self,
        model: nn.Module,
        muon_lr: float,
        adamw_lr: float,
        weight_decay: float = 0.01,
    ) -> None:
        self._parts = build_optimizers(model, muon_lr, adamw_lr, weight_decay)
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        loss = loss_of(closure)
        for part in self._parts:
            part.step()
        return loss


def build_optimizer(
    model: nn.Module,
    kind: str,
    rate: float,
    vector_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """`"muon"` (with AdamW for all but matrices) or `"adamw"`; only matrices decay.

    Args:
        rate: highest learning rate; with Muon that of the matrices.
        vector_rate: with Muon that of the rest.
    """
    if kind == "muon":
        return MuonAdamW(model, rate, vector_rate, weight_decay)
    matrices, rest = split_parameters(model)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=ADAMW_BETAS)
