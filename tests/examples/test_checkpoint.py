"""A training resumed from a checkpoint continues bit by bit, and a kill costs no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundled_pair import checkpoint
from bundled_pair.checkpoint import load_checkpoint, save_checkpoint
from bundled_pair.schedule import set_factor, trapezoid
from torch import nn

from vllm_specformer.training.optimizers import build_optimizers

STEPS = 8


class Toy(nn.Module):
    """Has every kind of parameter: matrix, table, vector, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(torch.tanh(self.linear(self.embed(x))))


def fresh(seed: int = 0) -> tuple[Toy, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = Toy()
    torch.manual_seed(99)
    nn.init.normal_(model.frozen.weight)
    nn.init.normal_(model.frozen.bias)
    return model, build_optimizers(model, muon_lr=0.02, adamw_lr=0.01)


def train(model: Toy, optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        model(torch.randint(5, (6,))).pow(2).sum().backward()
        set_factor(optimizers, trapezoid(step, STEPS, warmup=2, decay_fraction=0.5))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_resuming_is_bit_identical(tmp_path: Path) -> None:
    whole, optimizers = fresh()
    train(whole, optimizers, 0, STEPS)

    first, optimizers = fresh()
    train(first, optimizers, 0, 5)
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, first, optimizers, 5)
    second, optimizers = fresh(seed=1)
    assert not torch.equal(second.linear.weight, first.linear.weight)
    assert load_checkpoint(path, second, optimizers) == 5
    train(second, optimizers, 5, STEPS)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_optimizer_state_matters(tmp_path: Path) -> None:
    """What the test above relies on: without the optimisers' state the result differs."""
    whole, optimizers = fresh()
    train(whole, optimizers, 0, 5)
    forgetful, _ = fresh()
    forgetful.load_state_dict(whole.state_dict())
    train(whole, optimizers, 5, STEPS)
    _, anew = fresh()
    anew = build_optimizers(forgetful, muon_lr=0.02, adamw_lr=0.01)
    train(forgetful, anew, 5, STEPS)
    assert not torch.equal(whole.linear.weight, forgetful.linear.weight)


def test_only_trainable_weights_are_stored(tmp_path: Path) -> None:
    model, optimizers = fresh()
    save_checkpoint(tmp_path / "c.safetensors", model, optimizers, 0)
    other, optimizers = fresh()
    nn.init.zeros_(other.frozen.weight)
    assert load_checkpoint(tmp_path / "c.safetensors", other, optimizers) == 0
    assert not other.frozen.weight.any()


@pytest.mark.parametrize("dies_in", ["save_file", "replace"])
def test_a_kill_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    path = tmp_path / "c.safetensors"
    model, optimizers = fresh()
    train(model, optimizers, 0, 1)
    save_checkpoint(path, model, optimizers, 1)
    before = model.linear.weight.detach().clone()
    train(model, optimizers, 1, 2)

    def half_a_file(tensors: object, partial: Path, metadata: object) -> None:
        Path(partial).write_bytes(b"half")
        raise KeyboardInterrupt

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if dies_in == "save_file":
            patch.setattr(checkpoint, "save_file", half_a_file)
        else:
            patch.setattr(checkpoint.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, model, optimizers, 2)

    restored, optimizers = fresh(seed=1)
    assert load_checkpoint(path, restored, optimizers) == 1
    assert torch.equal(restored.linear.weight, before)
    save_checkpoint(path, model, optimizers, 2)
    assert load_checkpoint(path, restored, optimizers) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
