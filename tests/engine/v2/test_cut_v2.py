"""`draft_confidence_threshold` on the V2 runner; why text keeps its law is in test_adaptive_law.py.

See `support.v2.adaptive` for what a CPU needs for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from vllm import LLM

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.outputs import Tokens, continuations
from support.v2.adaptive import (
    best_prefixes,
    cut_engine,
    dense_chances,
    ties,
    watching_admissions,
    watching_chances,
)
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, K, engine, runner, speculator
from vllm_specformer.calibration import Calibrations
from vllm_specformer.engine.confidence.cut_v2 import ThresholdManager
from vllm_specformer.engine.speculative_config import CONFIDENCE
from vllm_specformer.errors import SpeculativeConfigError

SURE = 0.4
CLOSE = 1e-4  # as in test_adaptive.py


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Drafts are cut at SURE up to 6 requests; beyond, none is verified unless it is certain."""
    with cut_engine(drafting(K), [[1, 6, SURE], [7, 64, 1.0]]) as llm:
        yield llm


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Each step's requests, and how many drafts the chances known then allow, one by one."""
    seen: list[tuple[int, int]] = []
    original = ThresholdManager.get_num_tokens

    def counted(self: Any, tokens: dict[str, int], drafts: dict[str, list[int]]) -> int:
        chances = self._stale_confidences[self._stale_idx].np
        bar, allowed = (SURE if len(tokens) <= 6 else 1.0), 0
        for name in tokens:
            product = np.float64(1)
            for chance in chances[self.req_states.req_id_to_index[name]][
                : len(drafts.get(name, ()))
            ]:
                product *= np.float64(chance)
                allowed += product >= bar
        seen.append((len(tokens), allowed))
        return original(self, tokens, drafts)

    monkeypatch.setattr(ThresholdManager, "get_num_tokens", counted)
    return seen


def test_as_many_drafts_are_verified_as_are_sure_enough(
    llm: LLM,
    budgets: list[tuple[int, int]],
    reference: DenseReference,
    answers: dict[Tokens, Tokens],
) -> None:
    """The likeliest of the step; requests end one by one, and a long prompt comes in parts."""
    params = [greedy(MAX_TOKENS - n % 4) for n in range(9)]
    with watching(llm, answers) as watch, watching_admissions() as seen:
        outputs = llm.generate([*TEXTS[:8], LONG[0]], params, use_tqdm=False)
    assert all(answers[p][: len(t)] == t for p, t in continuations(outputs).items())
    print(f"drafts admitted {dict(seen.admitted)}, {seen.trimmed} trimmed steps; ", end="")
    assert [(len(step.scheduled), step.budget) for step in seen.steps] == budgets
    assert seen.trimmed >= 3
    assert len(seen.admitted) >= 3
    for step in seen.steps:
        assert ties(step) or step.admitted == best_prefixes(step)
    # A new request counts as certain until its first chances are known, an older one does not.
    assert any(step.budget == 0 for step in seen.steps if len(step.scheduled) > 6)
    assert_all_equal(reference, watch, at_least=40)


def test_chances_are_the_heads_calibration(llm: LLM, reference: DenseReference) -> None:
    """They stay so: a threshold that means something else tomorrow is none."""
    estimator = speculator(llm).acceptance_estimator
    assert not estimator.learns
    assert isinstance(runner(llm).adaptive_verification, ThresholdManager)
    curves = Calibrations.of(speculator(llm).model.config)
    with watching_chances(llm) as told:
        llm.generate(TEXTS[9:12], greedy(4), use_tqdm=False)
    assert len(told) >= 6
    for step in told:
        assert step.chances == pytest.approx(dense_chances(reference, step, curves), abs=CLOSE)


def test_without_full_graphs_it_is_refused_by_the_users_field() -> None:
    """Before any weights are loaded."""
    with (
        pytest.raises(ValueError, match=r"draft_confidence_threshold=.*0\.4.* full CUDA graphs"),
        engine(drafting(K, **{CONFIDENCE: SURE})),
    ):
        pass


def test_adapters_are_refused_by_the_users_field() -> None:
    with (
        pytest.raises(ValueError, match=r"draft_confidence_threshold=.* LoRA adapters.*leave the"),
        cut_engine(drafting(K), SURE, enable_lora=True, max_lora_rank=8),
    ):
        pass


def test_attention_that_cannot_is_refused_by_the_users_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM looks for it when the cache is laid out, and would name a field that nobody wrote."""
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification

    def unfit(*_: Any, **__: Any) -> str:
        return "SOME_ATTENTION"

    name = "get_query_lens_mismatch_unsupported_backend"
    monkeypatch.setattr(adaptive_verification, name, unfit)
    with (
        pytest.raises(SpeculativeConfigError, match=r"threshold=.*SOME_ATTENTION.*leave the"),
        cut_engine(drafting(K), SURE),
    ):
        pass
