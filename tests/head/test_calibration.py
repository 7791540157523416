"""Chances of acceptance out of a head's configuration."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from support.paths import TARGET
from vllm_specformer.calibration import Calibration, Calibrations, largest_log_odds
from vllm_specformer.config import SpecFormerConfig


def test_log_odds_of_the_largest_probability() -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(3, 5, 40)
    largest = logits.double().softmax(-1).amax(-1)
    found = largest_log_odds(logits)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), (largest / (1 - largest)).log(), atol=5e-3)
    assert largest_log_odds(torch.tensor([[0.0, 200.0]])).tolist() == [40.0]


def test_without_a_calibration_it_is_the_probability_itself() -> None:
    head = SpecFormerConfig.preset("default", AutoConfig.from_pretrained(TARGET), "t")
    curves = Calibrations.of(head)
    raw = torch.tensor([[0.5, -1.0, 2.0]])
    for curve in curves:
        assert len(curve.intercepts) == head.num_draft_slots
        assert torch.equal(curve.log_odds(raw), raw)


def test_a_slope_and_an_intercept_per_slot() -> None:
    curve = Calibration.of_field([2.0, 0.5, -0.5], slots=2)
    assert curve.field == (2.0, 0.5, -0.5)
    assert curve.log_odds(torch.tensor([[1.0, 1.0]])).tolist() == [[2.5, 1.5]]
    assert curve.log_odds(torch.tensor([1.0])).tolist() == pytest.approx([2.5])
