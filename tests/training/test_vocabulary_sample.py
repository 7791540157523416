"""What a step scores holds every label, and stands for the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.slot_loss import IGNORED
from vllm_specformer.training.vocabulary_sample import VocabularySample, draw_sample

TOKENS = 40


@pytest.fixture
def target(target_model: PreTrainedModel) -> HookedTarget:
    return HookedTarget(target_model, (0, 1))


@pytest.fixture
def states(target: HookedTarget) -> Tensor:
    torch.manual_seed(0)
    return 4 * torch.randn(7, target.target.config.hidden_size, dtype=torch.double)


def draw(target: HookedTarget, states: Tensor, labels: list[int], size: int) -> VocabularySample:
    return draw_sample(target, TOKENS, states, torch.tensor(labels), size, memory=1000)


def test_labels_and_what_is_likely_are_certain(target: HookedTarget, states: Tensor) -> None:
    sample = draw(target, states, [3, IGNORED, 39, 3], 16)
    certain = sample.indices[sample.offsets == 0].tolist()
    largest = target.lm_head(states).softmax(-1).amax(0)
    largest[[3, 39]] = 2
    assert set(certain) == set(largest.topk(8).indices.tolist())
    assert sample.indices.tolist() == sorted(set(sample.indices.tolist()))
    assert sample.places(torch.tensor([39, IGNORED])).tolist() == [len(sample.indices) - 1, IGNORED]


@pytest.mark.parametrize("size", [1, 4, 16, 39])
def test_each_token_is_stood_for_once(target: HookedTarget, states: Tensor, size: int) -> None:
    sample = draw(target, states, [1, 2, 30], size)
    assert sample.offsets.double().exp().sum() == pytest.approx(TOKENS)
    assert {1, 2, 30} <= set(sample.indices.tolist())
    # However many labels there are, a quarter of the sample stands for the others.
    assert len(sample.indices) <= max(size, 3 + math.ceil(size / 4))


def test_sums_over_the_vocabulary_are_right_on_average(
    target: HookedTarget, states: Tensor
) -> None:
    """Whatever is summed: steps draw the tokens that are not certain equally often."""
    values = torch.randn(TOKENS, dtype=torch.double)
    sums = []
    for times in range(1, 5):  # the labels' sum moves the draw, which has four phases
        sample = draw(target, states, [3] * times, 16)
        weights = sample.offsets.double().exp()
        assert weights.max() == pytest.approx(4)
        sums.append(weights @ values[sample.indices])
    assert len({round(float(one), 6) for one in sums}) == 4
    torch.testing.assert_close(torch.stack(sums).mean(), values.sum(), rtol=1e-6, atol=0)


def test_the_same_step_draws_the_same(target: HookedTarget, states: Tensor) -> None:
    one, two = (draw(target, states, [1, 5], 12) for _ in range(2))
    assert torch.equal(one.indices, two.indices)


def test_its_logits_are_the_targets(target: HookedTarget, states: Tensor) -> None:
    sample = draw(target, states, [1, 5], 12)
    expected = target.lm_head(states)[:, sample.indices]
    torch.testing.assert_close(sample.lm_head(states), expected)
