"""Engine against replay, with engines that are the dense head, run rightly or wrongly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.answered_pair import Pair
from vllm_specformer.evaluation.agreement import Agreement, compare
from vllm_specformer.evaluation.causes import Hypothesis, explain, hypotheses
from vllm_specformer.evaluation.replay import Alter, DraftedText, draft_texts
from vllm_specformer.evaluation.served import Served
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.acceptance import Acceptance
from vllm_specformer.training.hooked_rows import HookedRows

COUNT = 4


def served_by(
    pair: Pair, temperature: float, alter: Alter | None = None, target: HookedTarget | None = None
) -> Served:
    """The steps of an engine whose head drafts from altered rows."""
    steps = {}
    made = draft_texts(
        pair.head, target or pair.target, pair.texts(temperature), [COUNT], True, alter=alter
    )
    for text in made:
        ((start, end),) = text.answers
        drafter = text.drafter("head", COUNT)
        accepted = Acceptance(COUNT).walk(text.tokens[:end], start, drafter)
        steps[text.id] = [matched + 1 for matched in accepted]
    counters = {"num_preemptions": 0, "prefix_cache_hits": 0}
    return Served(COUNT, temperature, pair.answers[temperature], steps, counters, "0.32.0", "V1")


def drafted(pair: Pair, temperature: float) -> dict[int, DraftedText]:
    made = draft_texts(pair.head, pair.target, pair.texts(temperature), [COUNT], True)
    return {text.id: text for text in made}


def disagreement(pair: Pair, served: Served) -> tuple[Agreement, str]:
    agreement = compare(served, drafted(pair, served.temperature))
    texts = pair.texts(served.temperature)
    tried = hypotheses(pair.head, pair.target, texts, served, True)
    return agreement, "\n".join(explain(agreement, served, tried, "float32"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_head_agrees_to_the_step(pair: Pair, temperature: float) -> None:
    served = served_by(pair, temperature)
    # What vLLM accepts past an answer's end does not count.
    for steps in served.steps.values():
        steps[-1] += 2
        steps.append(1)
    agreement = compare(served, drafted(pair, temperature))
    assert agreement.same_steps == 1
    assert agreement.first is None
    assert (agreement.difference, agreement.agrees) == (0, True)
    for name in ("steps", "tokens", "accepted", "offered"):
        assert getattr(agreement.engine, name) == getattr(agreement.offline, name)
    assert agreement.own_words == (None if temperature else 1.0)


def normed(rows: HookedRows) -> HookedRows:
    return replace(rows, hooked_states=[*rows.hooked_states[:-1], rows.last_states])


def lost(rows: HookedRows) -> HookedRows:
    return replace(rows, segments=torch.arange(rows.segments.shape[1]).expand_as(rows.segments))


@pytest.mark.parametrize(
    ("alter", "cause"),
    [
        (normed, "the last hook is taken behind the final norm"),
        (lost, "the context's K/V cache is lost"),
    ],
)
def test_a_wrongly_run_head_is_caught_and_named(pair: Pair, alter: Alter, cause: str) -> None:
    agreement, said = disagreement(pair, served_by(pair, 0.0, alter))
    assert agreement.same_steps < 1
    assert f"most likely: {cause}. " in said
    assert "not another target: 100.0%" in said
    step = agreement.first
    assert step is not None
    assert f"first difference: prompt {step.text.id}, behind token {step.position + 1}." in said


def test_shifted_hooks_are_named(pair: Pair) -> None:
    moved = [max(i - 1, 0) for i in pair.target.hook_ids]
    early = HookedTarget(pair.target.target, sorted(set(moved)))

    def one_early(rows: HookedRows) -> HookedRows:
        states = [rows.hooked_states[early.hook_ids.index(i)] for i in moved]
        return replace(rows, hooked_states=states)

    agreement, said = disagreement(pair, served_by(pair, 0.0, one_early, early))
    assert not agreement.agrees
    assert agreement.difference < -0.02
    assert "most likely: the hooks are taken one layer earlier. " in said


def test_a_missing_markov_term_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pair.head.config, "markov_rank", 0)
        served = served_by(pair, 0.0)
    _, said = disagreement(pair, served)
    assert "most likely: the Markov term is left out. " in said
    assert pair.head.config.markov_rank > 0


def test_another_target_is_named(pair: Pair) -> None:
    """Greedy answers with other words than the offline target's."""
    served = served_by(pair, 1.0)
    served = replace(served, temperature=0.0, counters={"num_preemptions": 3})
    agreement = compare(served, drafted(pair, 1.0))
    assert agreement.own_words is not None
    assert agreement.own_words < 0.9
    tried = [Hypothesis("the context's K/V cache is lost", 0.5)]
    said = "\n".join(explain(agreement, served, tried, "bfloat16"))
    assert "another target: only" in said
    assert "3 preemptions: the K/V cache is too small" in said
    assert "bfloat16 rounds differently on both sides" in said


def test_what_nothing_explains(pair: Pair) -> None:
    """Steps of a head that drafts anything."""
    served = served_by(pair, 0.0)
    shuffled = {number: [1] * sum(steps) for number, steps in served.steps.items()}
    agreement, said = disagreement(pair, replace(served, steps=shuffled))
    assert agreement.engine.tokens_per_step == 1
    assert not agreement.agrees
    assert "unexplained: as configured" in said
