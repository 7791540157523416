"""The losses of a slot and their gradients are those that autograd gives of their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_specformer.training.slot_loss import IGNORED, Mix, TargetProbs, slot_loss

ROWS, TOKENS = 6, 11
MIXES = [Mix(), Mix(0.5), Mix(1.0), Mix(0.0, 1.0), Mix(0.0, 0.9), Mix(0.3, 0.3)]
MIXES += [Mix(hybrid=1.0), Mix(0.2, 0.3, 0.4)]


def defined(
    logits: Tensor, labels: Tensor, mix: Mix, p: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses as they are written down."""
    q = logits.float().softmax(-1)
    kept = labels != IGNORED
    cross_entropy = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
    divergence = (p * (p / q).log()).sum(-1)
    variation = (p - q).abs().sum(-1) / 2
    far = (-3 * (1 - variation.detach())).exp()
    each = (
        mix.cross_entropy * cross_entropy
        + mix.divergence * divergence
        + mix.variation * variation
        + mix.hybrid * (far * divergence + (1 - far) * variation)
    )
    return (weights * each)[kept].sum(), cross_entropy


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_its_definition_says(mix: Mix, dtype: torch.dtype, weighted: bool) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(ROWS, TOKENS)).to(dtype).requires_grad_()
    labels = torch.tensor([3, IGNORED, 0, 10, 3, IGNORED])
    others = 2 * torch.randn(4, TOKENS)
    places = torch.tensor([0, 3, 1, 1, 2, 0])
    weights = torch.rand(ROWS) if weighted else None
    ones = torch.ones(ROWS) if weights is None else weights
    expected = defined(logits, labels, mix, others.softmax(-1)[places], ones)
    (gradient,) = torch.autograd.grad(expected[0], logits)

    target = TargetProbs.of(others) if mix.needs_target else None
    got = slot_loss(logits, labels, mix, target, places, weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(2 * got[0], logits)
    # A row without a label must not move; autograd may round in another order.
    assert not found[labels == IGNORED].any()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    torch.testing.assert_close(found, 2 * gradient, **close)


def test_certain_targets_and_drafts_stay_finite() -> None:
    """A probability that rounds to 0 has no logarithm, but a part in the sum all the same."""
    logits = torch.tensor([[300.0, 0.0, -300.0], [0.0, 300.0, 0.0]], requires_grad=True)
    target = TargetProbs.of(torch.tensor([[0.0, 400.0, -400.0]]))
    places = torch.tensor([0, 0])
    loss, cross_entropy = slot_loss(logits, torch.tensor([1, 1]), Mix(0.5), target, places)
    loss.backward()
    assert cross_entropy.tolist() == pytest.approx([300, 0])
    assert float(loss.detach()) == pytest.approx(300)
    torch.testing.assert_close(
        logits.grad, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]), rtol=0, atol=1e-6
    )
