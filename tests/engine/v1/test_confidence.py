"""`draft_confidence_threshold`: fewer rows to verify, the same text and the same distribution."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.dense import DenseReference
from support.drafts import Watch, compare, truth, watching
from support.engines import Job, drafting, engine, greedy, prompts, run_plain
from support.heads import make_head
from support.outputs import Tokens, continuations, counting, token_ids
from support.paths import HEAD
from vllm_specformer.calibration import Calibration, Calibrations
from vllm_specformer.engine.confidence.cut_v1 import ConfidenceCut
from vllm_specformer.engine.speculative_config import (
    ADAPTIVE,
    CONFIDENCE,
    SCHEDULE,
    split_own_fields,
    threshold_at,
)
from vllm_specformer.errors import SpeculativeConfigError

TEXTS = prompts()[:24]
TOKENS = 40
SURE = 0.7


@pytest.fixture(scope="module")
def answers() -> Any:
    return run_plain({"all": Job(TEXTS, greedy(TOKENS))})["all"]


def served(threshold: Any, answers: Any, **engine_changes: Any) -> tuple[Watch, dict[str, int]]:
    """Answers with a threshold, which must be those without speculation."""
    speculative = drafting(4, **({} if threshold is None else {CONFIDENCE: threshold}))
    with (
        engine(speculative, **engine_changes) as llm,
        watching() as watch,
        counting(llm) as counted,
    ):
        assert token_ids(Job(TEXTS, greedy(TOKENS)).run(llm)) == token_ids(answers)
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return watch, {name: counted[f"spec_decode_{name}"] for name in names}


@pytest.fixture(scope="module")
def cut(answers: Any) -> tuple[Watch, dict[str, int]]:
    """Drafts cut at SURE, while prompts are read in parts beside them."""
    return served(SURE, answers, max_num_batched_tokens=64, max_num_seqs=8)


def test_fewer_drafts_and_more_of_them_right(
    answers: Any, cut: tuple[Watch, dict[str, int]]
) -> None:
    _, all_drafts = served(None, answers)
    watch, sure = cut
    shares = [c["num_accepted_tokens"] / c["num_draft_tokens"] for c in (all_drafts, sure)]
    assert sure["num_draft_tokens"] < all_drafts["num_draft_tokens"] / 2
    assert sure["num_accepted_tokens"] > all_drafts["num_accepted_tokens"] / 2
    assert shares[1] > 1.5 * shares[0]
    assert {len(d.drafts) for d in watch.drafted} == {0, 1, 2, 3, 4}


def test_drafts_are_the_dense_heads_up_to_the_threshold(cut: tuple[Watch, dict[str, int]]) -> None:
    """Every number of drafts, also none after some and some after none: K/V has no holes."""
    watch, _ = cut
    reference = DenseReference(HEAD)
    result = compare(reference, watch.drafted)
    assert result.wrong == []
    assert result.compared > 200
    ends = [(d, confidence(reference, d.text, d.slots)) for d in watch.drafted[:200]]
    for drafted, probabilities in ends:
        kept = len(drafted.drafts)
        assert all(o > SURE - 1e-3 for o in probabilities[:kept])
        assert kept == len(probabilities) or probabilities[kept] < SURE + 1e-3


def confidence(reference: DenseReference, text: Tokens, slots: int) -> list[float]:
    """Product of the chances up to each slot, by the dense head and its calibration."""
    (states,) = reference.slot_states(text, [len(text) - 2], slots)
    curve = Calibrations.of(reference.head.config).greedy
    previous, product, found = text[-1], 1.0, []
    for slot, intercept in zip(range(len(states)), curve.intercepts, strict=False):
        scores = reference.biased(states, slot, previous)
        odds = curve.slope * scores.softmax(-1).max().logit() + intercept
        product *= float(odds.sigmoid())
        found.append(product)
        previous = int(scores.argmax())
    return found


def test_thresholds_by_batch_size(answers: Any) -> None:
    """Requests finish one by one: none drafts while there are many, the last three draft it all.

    A step that cuts every draft is one without drafts, and stores its K/V all the same.
    """
    lengths = [4 + 4 * i for i in range(10)]
    params = [greedy(n) for n in lengths]
    expected = [[ids[0][:n]] for ids, n in zip(token_ids(answers), lengths, strict=False)]
    thresholds = [[1, 3, 0.0], [4, 64, 1.0]]
    with engine(drafting(4, **{CONFIDENCE: thresholds})) as llm, watching() as watch:
        assert token_ids(Job(TEXTS[:10], params).run(llm)) == expected
    assert {len(d.drafts) for d in watch.drafted} == {0, 4}
    whole = sum(n for (requests, _), n in watch.batch_sizes.items() if requests <= 3)
    assert 0 < sum(len(d.drafts) == 4 for d in watch.drafted) <= 3 * whole
    result = compare(DenseReference(HEAD), watch.drafted)
    assert result.wrong == []
    assert result.compared > 10


def test_beside_a_schedule(answers: Any) -> None:
    """What a plan prints: at most as many drafts as the schedule asks for."""
    schedule = [[1, 4, 4], [5, 16, 2], [17, 64, 0]]
    lengths = [4 + 2 * i for i in range(18)]
    expected = [[ids[0][:n]] for ids, n in zip(token_ids(answers), lengths, strict=False)]
    speculative = drafting(4, **{CONFIDENCE: 0.3, SCHEDULE: schedule})
    with engine(speculative) as llm, watching() as watch:
        job = Job(TEXTS[:18], [greedy(n) for n in lengths])
        assert token_ids(job.run(llm)) == expected
    assert {count for _, count in watch.batch_sizes} == {0, 2, 4}
    found = {(d.slots, len(d.drafts)) for d in watch.drafted}
    assert all(kept <= slots for slots, kept in found)
    assert found >= {(0, 0), (2, 0), (2, 2), (4, 4)}


@pytest.mark.parametrize("preset", ["default", pytest.param("paper", marks=pytest.mark.slow)])
def test_untrained_heads_and_right_guesses(tmp_path: Path, answers: Any, preset: str) -> None:
    """A head that knows nothing, helped to right drafts; with and without a Markov term."""
    head = make_head(tmp_path / "head", preset)
    with (
        engine(drafting(4, head, **{CONFIDENCE: 0.005})) as llm,
        watching(truth(continuations(answers))) as watch,
    ):
        assert token_ids(Job(TEXTS, greedy(TOKENS)).run(llm)) == token_ids(answers)
    assert {len(d.drafts) for d in watch.drafted} >= {1, 2, 3}
    assert watch.helped[2] > 10


def logits_of(largest: list[list[float]]) -> torch.Tensor:
    """Two tokens' logits of slots with these largest probabilities."""
    odds = torch.tensor(largest).logit()
    return torch.stack([odds, torch.zeros_like(odds)], dim=-1)


PLAIN = Calibrations(Calibration.none(3), Calibration.none(3))


def test_largest_probability_and_not_that_of_the_token() -> None:
    """What was drawn must not decide whether it is verified."""
    largest = [[0.9, 0.6, 0.9], [0.6, 0.6, 0.9], [0.999, 0.999, 0.999]]
    cut = ConfidenceCut([(1, 4, 0.5)], PLAIN)
    for tokens in ([[1, 0, 1]] * 3, [[0, 0, 0]] * 3):
        kept = cut.shorten(torch.tensor(tokens), logits_of(largest), None)
        assert kept == [tokens[0][:2], tokens[0][:1], tokens[2]]


def test_the_heads_calibration_decides() -> None:
    """Greedy and sampled requests apart, these at their temperatures."""
    doubtful = Calibration(1.0, (-3.0, 0.0, 0.0))
    cut = ConfidenceCut([(1, 4, 0.5)], Calibrations(Calibration.none(3), doubtful))
    tokens, logits = torch.zeros(2, 3, dtype=torch.int64), logits_of([[0.9, 0.9, 0.9]] * 2)
    assert [len(row) for row in cut.shorten(tokens, logits, None)] == [3, 3]
    # At temperature 2 the largest of 0.9 is 0.75.
    flat = ConfidenceCut([(1, 4, 0.7)], PLAIN)
    heat = torch.tensor([0.0, 2.0])
    assert [len(row) for row in flat.shorten(tokens, logits, heat)] == [3, 1]
    assert [len(row) for row in cut.shorten(tokens, logits, heat)] == [3, 0]


def test_the_last_range_goes_on() -> None:
    ranges = ((1, 4, 0.1), (5, 8, 0.7))
    found = [threshold_at(ranges, batch) for batch in (1, 4, 5, 8, 9, 500)]
    assert found == [0.1, 0.1, 0.7, 0.7, 0.7, 0.7]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (1.5, "it is no list of ranges"),
        (True, "it is no list of ranges"),
        ("0.5", "it is no list of ranges"),
        (float("nan"), "it is no list of ranges"),
        ([[1, 8]], "[1, 8] is not [first, last, threshold]"),
        ([[1, 8, 40]], "[1, 8, 40] has 40 for its threshold"),
        ([[2, 8, 0.4]], "the first range must start at 1"),
        ([[1, 8, 0.4], [8, 9, 0.5]], "two ranges hold the batch size 8"),
    ],
)
def test_values_that_are_refused(value: Any, problem: str) -> None:
    with pytest.raises(SpeculativeConfigError) as caught:
        split_own_fields({CONFIDENCE: value})
    assert problem in str(caught.value)
    assert "write a number from 0 to 1, or ranges" in str(caught.value)


def test_asynchronous_scheduling_on_v1() -> None:
    """Known before weights are loaded, when the proposer is built."""
    head = SimpleNamespace(hf_config=SimpleNamespace(specformer_confidence=((1, 8, 0.5),)))
    ahead = SimpleNamespace(
        speculative_config=SimpleNamespace(draft_model_config=head),
        scheduler_config=SimpleNamespace(async_scheduling=True),
    )
    with pytest.raises(SpeculativeConfigError, match="--no-async-scheduling"):
        ConfidenceCut.of(ahead)
    head.hf_config.specformer_confidence = None
    assert ConfidenceCut.of(ahead) is None


def test_not_beside_adaptive_verification() -> None:
    with pytest.raises(SpeculativeConfigError) as caught:
        split_own_fields({CONFIDENCE: 0.5, ADAPTIVE: True})
    message = "draft_confidence_threshold=0.5 cannot be combined with enable_adaptive"
    assert message in str(caught.value)
    _, own = split_own_fields({CONFIDENCE: 0.5, ADAPTIVE: False})
    assert own.confidence is not None
