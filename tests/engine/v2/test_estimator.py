"""Chances by the head's calibration, through vLLM's estimator and its kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from vllm.v1.worker.gpu.spec_decode.acceptance_estimator import OnlineAcceptanceEstimator

from support.paths import TARGET
from vllm_specformer.calibration import Calibration, Calibrations, largest_log_odds
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.engine.confidence.estimator import CalibratedEstimator, of_head

K, STATES = 3, 4
CURVES = Calibrations(Calibration(1.2, (0.3, 0.1, -0.2)), Calibration(0.4, (0.5, -0.1, -0.6)))
TEMPERATURE = torch.tensor([0.0, 0.7, 0.0, 1.5])
ROWS = torch.tensor([3, 0, -1, 1])  # the third row of the batch is a graph's padding
VOCABULARY = 50


def logits() -> Tensor:
    """Of every row's slots, [R, K, V]."""
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(len(ROWS), K, VOCABULARY, generator=generator)


def told(estimator: CalibratedEstimator, slot_by_slot: bool) -> Tensor:
    """Chances of the batch, [R, K]."""
    found = torch.full((len(ROWS), K), math.nan)
    scores, each = logits(), torch.arange(K, dtype=torch.int32)
    if slot_by_slot:
        for slot in range(K):
            estimator.predict(scores[:, slot], ROWS, each[slot], found, TEMPERATURE)
    else:
        rows, slots = ROWS.repeat_interleave(K), each.repeat(len(ROWS))
        estimator.predict(scores.flatten(0, 1), rows, slots, found, TEMPERATURE)
    return found


def expected_odds() -> Tensor:
    """Of the requests there are, by state, [STATES, K]; 0 of the others."""
    odds = torch.zeros(STATES, K)
    for row, state in zip(logits(), ROWS.tolist(), strict=True):
        if state >= 0:
            t = float(TEMPERATURE[state])
            curve = CURVES.sampled if t else CURVES.greedy
            odds[state] = curve.log_odds(largest_log_odds(row / (t or 1)))
    return odds


@pytest.mark.parametrize("slot_by_slot", [False, True])
def test_chances_are_the_calibrations(slot_by_slot: bool) -> None:
    """Of greedy and sampled requests apart; padding changes nothing."""
    estimator = CalibratedEstimator(STATES, K, torch.device("cpu"), CURVES)
    for _ in range(2):  # a graph is replayed
        found = told(estimator, slot_by_slot)
        odds = expected_odds()
        assert torch.allclose(estimator.features[:STATES], odds, atol=1e-4)
        for row, state in enumerate(ROWS.tolist()):
            if state >= 0:
                assert torch.allclose(found[row], odds[state].sigmoid(), atol=1e-4)


@pytest.mark.parametrize("learns", [True, False])
def test_it_goes_on_learning_unless_it_must_not(learns: bool) -> None:
    estimator = CalibratedEstimator(STATES, K, torch.device("cpu"), CURVES, learns)
    estimator.REFIT_INTERVAL = 2  # type: ignore[misc]
    before = told(estimator, True)
    rows, accepted = torch.tensor([3, 0, 1]), torch.tensor([1, 1, 1])
    for _ in range(2):
        estimator.step(rows, accepted, torch.tensor([K, K, K]))  # every first draft is refused
    after = told(estimator, True)
    of_requests = ROWS >= 0
    if learns:
        assert (after[of_requests, 0] < before[of_requests, 0]).all()
    else:
        assert torch.equal(after[of_requests], before[of_requests])


def head(**changes: tuple[float, ...]) -> SpecFormerConfig:
    target = AutoConfig.from_pretrained(TARGET)
    return SpecFormerConfig.preset("default", target, "t", num_draft_slots=4, **changes)


def test_what_a_head_without_calibration_gets() -> None:
    """vLLM's own estimator; where a threshold is asked for, the probability itself for ever."""
    vllms = OnlineAcceptanceEstimator(STATES, K, torch.device("cpu"))
    usual = float(vllms.slope), vllms.intercepts.tolist()
    assert of_head(head(), vllms, STATES, has_bar=False) is vllms
    fixed = of_head(head(), vllms, STATES, has_bar=True)
    assert not fixed.learns
    assert fixed._slopes.tolist() == [1, 1]
    assert not fixed._intercepts.any()
    # Of a head that knows greedy requests only, sampled ones begin as vLLM's do.
    half = of_head(head(acceptance_calibration=(2.0, 1, 1, 1, 1)), vllms, STATES, has_bar=False)
    assert half.learns
    assert half._slopes.tolist() == [2, usual[0]]
    assert half._intercepts.tolist() == [[1] * K, pytest.approx(usual[1])]
