"""vLLM's adaptive verification with a head: what is verified, and that the text is the target's.

See `support.v2.adaptive` for what a CPU needs for it, and test_adaptive_law.py for why sampled text
keeps its law. What else it meets is in test_adaptive_more.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.v1.worker.gpu.spec_decode.acceptance_estimator import OnlineAcceptanceEstimator

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.outputs import Tokens, continuations
from support.v2.adaptive import (
    adaptive_engine,
    as_it_is,
    best_prefixes,
    dense_chances,
    set_costs,
    ties,
    watching_admissions,
    watching_chances,
)
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, K, engine, speculator
from vllm_specformer.calibration import Calibrations
from vllm_specformer.engine.confidence.estimator import CalibratedEstimator, of_head
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

# Chances are compared after a sigmoid; the logits differ by the order of sums in fp32.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with adaptive_engine(drafting(K)) as llm:
        assert isinstance(speculator(llm).acceptance_estimator, CalibratedEstimator)
        yield llm


@pytest.fixture
def fresh(llm: LLM) -> OnlineAcceptanceEstimator:
    """The engine's estimator, as it starts with a head that has no calibration."""
    ours = speculator(llm)
    estimator = OnlineAcceptanceEstimator(ours.max_num_reqs, K, torch.device("cpu"))
    ours.acceptance_estimator = estimator
    return estimator


def test_the_likeliest_drafts_are_verified(
    llm: LLM,
    fresh: OnlineAcceptanceEstimator,
    reference: DenseReference,
    answers: dict[Tokens, Tokens],
) -> None:
    """With the oracle, so that drafts are accepted and refused; with a prompt among the drafts."""
    params = [greedy(MAX_TOKENS - n % 4) for n in range(9)]
    before = speculator(llm).monitor._drafted
    with watching(llm, answers) as watch, watching_admissions() as seen:
        outputs = llm.generate([*TEXTS[:8], LONG[0]], params, use_tqdm=False)
    found = continuations(outputs)
    assert all(answers[p][: len(t)] == t for p, t in found.items())
    print(f"drafts admitted {dict(seen.admitted)}, {seen.trimmed} trimmed steps; ", end="")
    assert seen.trimmed >= 3
    assert len(seen.admitted) >= 3
    for step in seen.steps:
        assert sum(step.admitted) == step.budget
        assert ties(step) or step.admitted == best_prefixes(step)
    # A step's K and V are where they belong, however few rows it had.
    assert_all_equal(reference, watch, at_least=40)
    # Our monitor counts what was verified, not what was drafted.
    verified = sum(step.budget for step in seen.steps)
    assert speculator(llm).monitor._drafted - before == verified
    # An accepted draft is seen, and the first that is refused.
    assert 0 < float(fresh.counts.sum()) <= verified


def test_a_row_that_costs_nothing_is_always_verified(
    llm: LLM, fresh: OnlineAcceptanceEstimator, answers: dict[Tokens, Tokens]
) -> None:
    with watching_admissions() as seen:
        set_costs(llm, 0.0)
        outputs = llm.generate(TEXTS[8:11], greedy(5), use_tqdm=False)
        set_costs(llm, 1e6)
        outputs += llm.generate(TEXTS[11:14], greedy(5), use_tqdm=False)
    set_costs(llm, 1 / 3)
    assert all(answers[p][: len(t)] == t for p, t in continuations(outputs).items())
    assert seen.admitted.keys() == {0, K}


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_chances_are_those_of_the_dense_head(
    llm: LLM, fresh: OnlineAcceptanceEstimator, reference: DenseReference, is_calibrated: bool
) -> None:
    """Drawn drafts do not tell: the best tokens lead from slot to slot.

    The bundled head has a calibration, of greedy and of sampled requests.
    """
    ours, curves = speculator(llm), as_it_is(fresh)
    if is_calibrated:
        ours.acceptance_estimator = of_head(ours.model.config, fresh, ours.max_num_reqs, False)
        curves = Calibrations.of(ours.model.config)
        assert curves.greedy != curves.sampled
    sampled = SamplingParams(temperature=0.7, max_tokens=4, seed=1)
    with watching_chances(llm) as seen:
        llm.generate(TEXTS[:6], [greedy(5), sampled] * 3, use_tqdm=False)
    assert sorted({round(told.temperature, 3) for told in seen}) == [0, 0.7]
    apart = 0
    for told in seen:
        assert told.chances == pytest.approx(dense_chances(reference, told, curves), abs=CLOSE)
        slots = reference.slot_states(told.text, [len(told.text) - 2], K)[0]
        apart += int(reference.biased(slots, 0, told.text[-1]).argmax()) != told.drafts[0]
    assert len(seen) >= 15
    assert apart > 0, "every draft is the best token, nothing was drawn"


def test_other_draws_leave_the_chances_alone(
    llm: LLM, fresh: OnlineAcceptanceEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step again with other seeds."""
    propose, differing = SpecFormerSpeculator.propose, []

    def twice(self: SpecFormerSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        drafts = propose(self, batch, *args, **kwargs).clone()
        chances = self.draft_token_confidence_probs[: batch.num_reqs].clone()
        self.seeds.add_(1)
        self._draft(batch.num_reqs, batch.num_tokens, K)
        assert torch.equal(self.draft_token_confidence_probs[: batch.num_reqs], chances)
        differing.append(bool((self.draft_tokens[: batch.num_reqs] != drafts).any()))
        return propose(self, batch, *args, **kwargs)

    monkeypatch.setattr(SpecFormerSpeculator, "propose", twice)
    params = [SamplingParams(temperature=1, max_tokens=3, seed=n) for n in range(4)]
    llm.generate(TEXTS[:4], params, use_tqdm=False)
    assert any(differing)


def test_the_estimator_learns_while_serving(
    llm: LLM, fresh: OnlineAcceptanceEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnlineAcceptanceEstimator, "REFIT_INTERVAL", 4)
    before = float(fresh.slope), fresh.intercepts.clone()
    llm.generate(TEXTS[14:20], greedy(8), use_tqdm=False)
    assert fresh._refits > 0
    assert float(fresh.slope) != before[0]
    assert not torch.equal(fresh.intercepts, before[1])
    assert fresh.intercepts.isfinite().all()


def test_vllm_asks_for_full_graphs() -> None:
    """Before any weights are loaded."""
    with (
        pytest.raises(ValueError, match="Adaptive verification requires full CUDA graphs"),
        engine(drafting(K, enable_adaptive_verification=True)),
    ):
        pass
