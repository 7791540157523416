"""What is observed of drafts on known texts, and the fit to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.dense import DenseReference
from support.engines import prompts, tokenizer
from support.paths import HEAD, TARGET
from vllm_specformer.calibration import Calibration
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.evaluation.calibrate import (
    Observed,
    calibrate,
    chances_of,
    errors,
    fit,
    observe,
)
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.packed_head import PackedHead
from vllm_specformer.training.texts import Text, Texts

SLOTS = 3
TRUE = Calibration(0.7, (0.4, -0.3, -1.0))


def drawn(texts: int, per_text: int) -> Observed:
    """Verdicts on drafts whose chances follow TRUE."""
    rng = np.random.default_rng(0)
    count = texts * per_text
    slot = rng.integers(SLOTS, size=count)
    odds = rng.normal(0.5, 1.5, size=count)
    text = np.repeat(np.arange(texts), per_text)
    seen = Observed(slot, odds, np.zeros(count), rng.random(count), np.arange(count), text)
    labels = (rng.random(count) < chances_of(TRUE, seen)).astype(float)
    return Observed(slot, odds, labels, seen.weight, seen.step, text)


def test_the_fit_finds_the_curve_that_verdicts_were_drawn_by() -> None:
    found = fit(drawn(40, 1000), SLOTS)
    assert found.field == pytest.approx(TRUE.field, abs=0.06)


def test_errors_are_those_of_texts_that_were_not_fitted_to() -> None:
    found, report = calibrate(drawn(40, 250), SLOTS)
    assert report["texts"] == 40
    assert report["calibration"] == list(found.field)
    assert report["fitted_to_the_other_half"]["ece"] < 0.03 < report["probability"]["ece"]
    with pytest.raises(SpecFormerError, match=r"--calibrate: 7 answers .* at least 8"):
        calibrate(drawn(7, 10), SLOTS)


def test_errors_by_weight() -> None:
    one, two = np.array([0, 0]), np.array([1.0, 0.0])
    seen = Observed(one, two, chance=two, weight=np.array([3.0, 1.0]), step=one, text=one)
    assert errors(np.array([0.8, 0.2]), seen) == {
        "ece": pytest.approx(0.2),
        "log_loss": pytest.approx(-np.log(0.8), abs=1e-4),
    }


def test_a_slot_that_nothing_is_known_of_and_one_that_is_never_accepted() -> None:
    ten = np.arange(10)
    seen = Observed(0 * ten, ten / 5, 0.0 * ten, 1.0 + 0 * ten, ten, ten)
    found = fit(seen, 2)
    assert found.slope > 0
    assert found.intercepts[0] < 0 == found.intercepts[1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_observed_is_the_dense_heads(temperature: float) -> None:
    """Of the bundled head, which has a Markov term, on two texts in rows of their own."""
    reference = DenseReference(HEAD)
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    head = PackedHead.from_pretrained(HEAD, dtype=torch.float32).eval()
    target = HookedTarget(model, head.config.aux_hidden_state_layer_ids)
    ids = [tokenizer()(text)["input_ids"][:24] for text in prompts()[:2]]
    made = [
        Text(7 + n, np.array(own, dtype=np.int32), ((len(own) - 9, len(own)),), temperature)
        for n, own in enumerate(ids)
    ]
    texts = Texts.collect(made, 64)
    seen = observe(head, target, texts, packed=False, slots=SLOTS)
    assert set(seen.text) == {7, 8}
    expected = []
    for own in ids:
        with torch.no_grad():
            wanted = model(torch.tensor([own])).logits[0] / (temperature or 1)
        for anchor in range(len(own) - 10, len(own) - 2):
            expected += dense(reference, own, anchor, wanted, temperature)
    columns = (seen.slot, seen.log_odds, seen.chance, seen.weight)
    found = sorted(zip(*(c.tolist() for c in columns), strict=True))
    assert len(found) == len(expected)
    for row, other in zip(found, sorted(expected), strict=True):
        assert row == pytest.approx(other, abs=2e-3)


def dense(
    reference: DenseReference, own: list[int], anchor: int, wanted: torch.Tensor, t: float
) -> list[tuple[float, ...]]:
    """Slot, log-odds, chance and weight of one anchor's drafts."""
    (slots,) = reference.slot_states(own[: anchor + 2], [anchor], SLOTS)
    rows, weight = [], 1.0
    best = previous = own[anchor + 1]
    for slot in range(len(slots)):
        if anchor + 2 + slot >= len(own):
            break
        token = own[anchor + 2 + slot]
        along = reference.biased(slots, slot, best) / (t or 1)
        q = (reference.biased(slots, slot, previous) / (t or 1)).softmax(-1)
        p = wanted[anchor + 1 + slot].softmax(-1)
        best, previous = int(along.argmax()), token
        odds = float(along.softmax(-1).max().logit())
        if t:
            chance, ratio = float(torch.minimum(p, q).sum()), min(1.0, float(q[token] / p[token]))
        else:
            chance = ratio = float(best == token)
        rows.append((slot, odds, chance, weight))
        weight *= ratio
    return rows
