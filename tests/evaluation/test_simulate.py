"""Simulated decoding: against replays where those are exact, and its own check of the text."""

from __future__ import annotations

import pytest
import torch

from support.answered_pair import MAX_TOKENS, Pair
from support.paths import TARGET
from vllm_specformer.evaluation.replay import draft_texts, replay_tree
from vllm_specformer.evaluation.simulate import (
    COUPLED,
    DETERMINISTIC,
    WITH,
    WITHOUT,
    Arm,
    Outcome,
    nucleus,
    simulate,
)
from vllm_specformer.evaluation.trees import TreeReplay
from vllm_specformer.target.files import end_token_ids


def run(pair: Pair, arm: Arm, temperature: float, count: int = 8, top_p: float = 1.0) -> Outcome:
    texts = pair.answers[0.0][:count]
    return simulate(
        pair.target,
        pair.head,
        [text.input_ids[: text.spans[0][0]].tolist() for text in texts],
        arm,
        temperature=temperature,
        top_p=top_p,
        max_tokens=MAX_TOKENS,
        end_ids=end_token_ids(TARGET),
        seed=0,
    )


def test_greedy_steps_are_those_of_a_replay(pair: Pair) -> None:
    replay = TreeReplay((4, 16))
    texts = list(draft_texts(pair.head, pair.target, pair.texts(0.0), (8,), True, trees=replay))
    by_id = {text.id: text for text in texts}
    for nodes in replay.nodes:
        found = run(pair, Arm(COUPLED, nodes=nodes), 0.0)
        expected = [replay_tree(by_id[answer.id], nodes, 8) for answer in pair.answers[0.0][:8]]
        assert found.tokens == [one.tokens for one in expected]
        assert found.steps == [one.steps for one in expected]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize(
    "arm",
    [
        Arm(DETERMINISTIC, nodes=6),
        Arm(COUPLED, nodes=6),
        Arm(COUPLED, nodes=6, is_chain=True),
        Arm(WITHOUT, (3, 1, 1)),
        Arm(WITH, (3, 1, 1)),
    ],
    ids=["deterministic", "coupled", "coupled chain", "without", "with"],
)
def test_text_is_the_targets(pair: Pair, arm: Arm, top_p: float) -> None:
    found = run(pair, arm, 1.0, top_p=top_p)
    assert found.rows == sum(found.tokens) > 100
    assert found.distance < 2 * found.chance
    assert 1.2 < sum(found.tokens) / sum(found.steps) < 4
    assert sum(map(sum, found.accepted)) == sum(found.tokens) - sum(found.steps)


def test_a_wrong_text_is_noticed() -> None:
    """Always the most probable token, where it should be drawn."""
    found = Outcome([0], [0])
    for _ in range(300):
        found.count(torch.tensor([0.6, 0.3, 0.1] + [0.0] * 60, dtype=torch.float64), 0)
    assert found.distance == pytest.approx(0.4)
    assert found.chance < 0.04


def test_nucleus() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = [int((nucleus(logits, p) > -torch.inf).sum()) for p in (0.3, 0.5, 0.8, 1.0)]
    assert kept == [1, 2, 3, 4]
