"""A training of a library's head that is stopped goes on as if it had not been.

Runs where the library is installed (docs/peers.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("speculators", reason="only the environment of `make peers` has it")

from peers.checkpoint import load, save
from peers.library import new_peer
from peers.plan import PEERS, TARGET
from peers.target_states import Aside, TargetStates
from peers.train_peer import Training

from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training.texts import Text, Texts


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> TargetStates:
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, 2000, 40).astype(np.int32) for _ in range(4)]
    texts = Texts.collect((Text(n, t, ((10, len(t)),), 0.0) for n, t in enumerate(ids)), 64)
    target = HookedTarget(load_target(TARGET, torch.float32, torch.device("cpu")), range(1, 7))
    return TargetStates(tmp_path_factory.mktemp("states"), target, texts, Aside())


def begun(kind: str, states: TargetStates, seed: int) -> Training:
    torch.manual_seed(seed)
    return Training(new_peer(kind, 2048, 1), states.texts, states, seed=3)


def weights(training: Training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in training.parameters])


@pytest.mark.parametrize("kind", PEERS)
def test_it_goes_on_from_its_checkpoint(kind: str, states: TargetStates, tmp_path: Path) -> None:
    whole = begun(kind, states, seed=0)
    whole.step([0, 1], 0.1)
    save(tmp_path / "checkpoint", whole.peer.model, whole.optimizers, whole.counts)
    first = weights(whole)
    other = begun(kind, states, seed=1)
    assert not torch.equal(weights(other), first)
    found = load(tmp_path / "checkpoint", other.peer.model, other.optimizers)
    assert found == whole.counts
    other.counts = found
    assert torch.equal(weights(other), first)
    for training in (whole, other):
        training.step([2, 3], 0.2)
    assert not torch.equal(weights(whole), first)
    assert torch.equal(weights(other), weights(whole))


def test_nothing_to_go_on_from(states: TargetStates, tmp_path: Path) -> None:
    training = begun("eagle3", states, seed=0)
    assert load(tmp_path / "checkpoint", training.peer.model, training.optimizers) is None
