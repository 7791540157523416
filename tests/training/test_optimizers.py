"""Muon and AdamW in one optimiser do what the two do, and survive being saved."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.training.optimizers import (
    MuonAdamW,
    build_optimizer,
    build_optimizers,
    split_parameters,
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def step(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], number: int) -> None:
    model(torch.ones(2, 4) * number).pow(2).sum().backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
        optimizer.zero_grad()


def test_one_is_two() -> None:
    """Also after a save and a load in the middle, by what the Trainer uses for both."""
    one, two = model(), model()
    joined: torch.optim.Optimizer = MuonAdamW(one, 0.02, 0.01)
    parts = build_optimizers(two, 0.02, 0.01)
    for number in range(6):
        if number == 3:
            file = io.BytesIO()
            torch.save(joined.state_dict(), file)
            file.seek(0)
            joined = MuonAdamW(one, 7.0, 7.0)
            joined.load_state_dict(torch.load(file, weights_only=True))
        step(one, [joined], number)
        step(two, parts, number)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedulers_reach_both() -> None:
    optimizer = MuonAdamW(model(), 0.02, 0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.005]


def test_what_is_a_matrix(target_model: PreTrainedModel) -> None:
    config = SpecFormerConfig.preset("default", target_model.config, "t", markov_rank=4)
    head = SpecFormerHead(config)
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    matrices, rest = ([names[id(p)] for p in part] for part in split_parameters(head))
    assert "fc.weight" in matrices
    assert "positional_proj.weight" in matrices
    for name in ("hook_norm_weight", "markov_embed.weight", "markov_lm_head.weight"):
        assert name in rest
    assert len(matrices) + len(rest) == len(names)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_only_matrices_decay(kind: str) -> None:
    optimizer = build_optimizer(model(), kind, 0.1, 0.02, 0.3)
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in first["params"]} == {2}
    assert {p.ndim for p in second["params"]} == {1}
    assert (first["lr"], second["lr"]) == (0.1, pytest.approx(0.02 if kind == "muon" else 0.1))
