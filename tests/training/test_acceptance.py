"""Replayed acceptance on texts small enough to count by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from support.plain_drafts import head_drafts
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.acceptance import Acceptance, Lookup, repeated_fraction

TEXT = [1, 2, 10, 11, 12, 13, 14, 15]  # two prompt tokens, six generated


def replay(drafts: dict[int, Sequence[int]], slots: int = 2) -> tuple[Acceptance, list[int]]:
    """Walk TEXT with the drafts given per position; also returns the positions visited."""
    visited: list[int] = []

    def drafter(position: int) -> Sequence[int]:
        visited.append(position)
        return drafts.get(position, [0] * slots)

    acceptance = Acceptance(slots)
    steps = acceptance.walk(TEXT, 2, drafter)
    assert [a + s + 1 for a, s in zip(visited, steps, strict=True)] == [*visited[1:], len(TEXT) - 1]
    return acceptance, visited


def test_perfect_drafts() -> None:
    acceptance, visited = replay({1: [11, 12], 4: [14, 15]})
    assert visited == [1, 4]
    assert (acceptance.steps, acceptance.tokens, acceptance.tokens_per_step) == (2, 6, 3.0)
    assert (acceptance.accepted, acceptance.offered) == ([2, 2], [2, 2])
    assert acceptance.per_position == [1.0, 1.0]


def test_useless_drafts() -> None:
    acceptance, visited = replay({})
    assert visited == [1, 2, 3, 4, 5, 6]
    assert acceptance.tokens_per_step == 1.0
    assert acceptance.accepted == [0, 0]


def test_a_right_draft_after_a_wrong_one_does_not_count() -> None:
    acceptance, visited = replay({1: [0, 12], 2: [12, 0], 4: [14, 0]})
    assert visited == [1, 2, 4, 6]
    assert acceptance.accepted == [2, 0]
    assert acceptance.tokens == 6


def test_no_drafts_are_offered_past_the_end() -> None:
    acceptance, visited = replay({1: [11, 12], 4: [14, 0]})
    assert visited == [1, 4, 6]
    assert acceptance.offered == [2, 2]
    assert acceptance.accepted == [2, 1]


def test_texts_add_up() -> None:
    acceptance = Acceptance(1)
    for _ in range(3):
        acceptance.walk(TEXT, 2, lambda position: [TEXT[position + 2]])
    assert (acceptance.steps, acceptance.tokens) == (9, 18)


def test_certain_chances_are_drafts_that_are_right_or_wrong() -> None:
    drafts = {1: [11, 12], 4: [14, 0], 6: [0]}
    walked, _ = replay(drafts)
    expected = Acceptance(2)
    expected.expect(len(TEXT), 2, lambda position: CERTAIN.get(position, [0.0, 0.0]))
    assert vars(expected) == vars(walked)


CERTAIN = {1: [1.0, 1.0], 4: [1.0, 0.0]}


def test_expectation_is_the_mean_of_all_that_may_happen() -> None:
    """Every outcome of every draft is walked through, with its probability."""
    chances = {1: [0.5, 0.25], 2: [0.75, 0.5], 3: [0.25, 0.75], 4: [0.5, 0.5], 5: [0.75, 0.0]}
    expected = Acceptance(2)
    expected.expect(len(TEXT), 2, lambda position: chances.get(position, []))
    steps = tokens = 0.0
    accepted, offered = [0.0, 0.0], [0.0, 0.0]
    places = [(position, slot) for position in chances for slot in (0, 1)]
    for outcome in itertools.product((True, False), repeat=len(places)):
        right = dict(zip(places, outcome, strict=True))
        weight = math.prod(
            chances[position][slot] if is_right else 1 - chances[position][slot]
            for (position, slot), is_right in right.items()
        )
        walked = Acceptance(2)
        walked.walk(
            TEXT,
            2,
            lambda at, right=right: (
                [  # type: ignore[misc]
                    TEXT[at + 2 + slot] if right[at, slot] else 0
                    for slot in (0, 1)
                    if at + 2 + slot < len(TEXT)
                ]
                if at in chances
                else []
            ),
        )
        steps, tokens = steps + weight * walked.steps, tokens + weight * walked.tokens
        for slot in (0, 1):
            accepted[slot] += weight * walked.accepted[slot]
            offered[slot] += weight * walked.offered[slot]
    assert expected.steps == pytest.approx(steps)
    assert expected.tokens == pytest.approx(tokens)
    assert expected.tokens == pytest.approx(6)
    assert expected.accepted == pytest.approx(accepted)
    assert expected.offered == pytest.approx(offered)


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1]),  # the longest match wins
        ([5, 1, 7, 7, 1], [7, 7]),  # a shorter one where no longer exists
        ([1, 4, 1, 5, 1], [4, 1]),  # the earliest of several
        ([1, 2, 3], []),  # none
        ([4, 4], [4]),  # what follows may be cut by the end
        ([4], []),
    ],
)
def test_lookup(text: list[int], drafts: list[int]) -> None:
    assert Lookup(text, longest=3, shortest=1).drafts(len(text), count=2) == drafts


def test_lookup_sees_nothing_past_its_end() -> None:
    assert Lookup([1, 2, 8, 1, 2], longest=2, shortest=1).drafts(end=4, count=4) == [2, 8, 1]
    assert Lookup([7, 1, 1], longest=1, shortest=1).drafts(end=2, count=4) == []


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1] * 7, 0.75), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repeated_fraction(tokens: list[int], expected: float) -> None:
    assert repeated_fraction(tokens) == pytest.approx(expected)


def test_drafts_of_a_whole_text_are_those_of_its_beginnings(
    head: SpecFormerHead, target_model: PreTrainedModel
) -> None:
    """No draft may profit from tokens that are not there yet."""
    target = HookedTarget(target_model, head.config.aux_hidden_state_layer_ids)
    torch.manual_seed(3)
    text = torch.randint(40, (12,))
    drafts = head_drafts(head, target, text, 3)
    assert drafts.shape == (11, 3)
    for end in range(2, 12):
        assert head_drafts(head, target, text[:end], 3)[-1].tolist() == drafts[end - 2].tolist()
