"""Kept states are those of the target, are made once, and are not on the training's clock."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peers.clock import CpuClock
from peers.target_states import Aside, TargetStates

from support.paths import TARGET
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training.texts import Text, Texts

# Kept in 16 bit.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def target() -> HookedTarget:
    model = load_target(TARGET, torch.float32, torch.device("cpu"))
    return HookedTarget(model, range(1, 7))


@pytest.fixture(scope="module")
def texts() -> Texts:
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, 2000, length).astype(np.int32) for length in (17, 30, 9)]
    return Texts.collect((Text(n, t, ((4, len(t)),), 0.0) for n, t in enumerate(ids)), 64)


def test_states_are_the_targets_own(tmp_path: Path, target: HookedTarget, texts: Texts) -> None:
    kept = TargetStates(tmp_path, target, texts, Aside())
    kept.make([0, 2])
    for index in (0, 2):
        alone, _ = target(torch.from_numpy(texts.input_ids(index).astype(np.int64))[None])
        wanted = torch.stack(alone, 2)[0]
        error = (kept.of(index) - wanted).norm() / wanted.norm()
        assert error < TOLERANCE
    assert not kept.of(1).any()


def test_states_are_made_once(tmp_path: Path, target: HookedTarget, texts: Texts) -> None:
    TargetStates(tmp_path, target, texts, Aside()).make([0, 1, 2])
    aside = Aside()
    again = TargetStates(tmp_path, target, texts, aside)
    again.make([2, 1, 0])
    assert aside.seconds == 0
    assert again.of(1).any()


def test_the_clock_leaves_out_what_is_counted_aside() -> None:
    aside = Aside()
    clock = CpuClock(100.0, aside)
    clock.start(50.0, 0.0)
    with aside.counted():
        burn(0.3)
    assert clock.seconds < 50.2
    burn(0.3)
    assert 50.3 <= clock.seconds < 50.5
    assert clock.advance() == pytest.approx(clock.seconds / 100, abs=1e-3)
    time.sleep(0.2)
    assert clock.seconds < 50.5
    assert not clock.over


def burn(seconds: float) -> None:
    """Use the processor for so long."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))
