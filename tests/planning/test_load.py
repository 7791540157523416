"""A plan's costs through a whole load, against sums made by hand."""

from __future__ import annotations

import pytest

from vllm_specformer.planning.choose import PlanRow
from vllm_specformer.planning.load import seconds_under_load
from vllm_specformer.planning.plan_file import Plan

# A step costs a second, and a tenth for every request; drafting two, a half more.
ROWS = [
    PlanRow(
        batch,
        count,
        tokens_per_step=2.0 if count else 1.0,
        plain=1 + 0.1 * batch,
        step=(1 + 0.1 * batch) * (1.5 if count else 1.0),
        draft=0.0,
        plain_prompt=3.0 / batch,
        prompt=4.0 / batch,
    )
    for batch in (1, 2, 4)
    for count in (0, 2)
]


def test_one_at_a_time_is_prompts_and_steps() -> None:
    # The first token comes with the prompt: 4 and 2 steps are left.
    assert seconds_under_load(ROWS, [5, 3], 1, None) == pytest.approx(2 * 3.0 + 6 * 1.1)
    drafting = seconds_under_load(ROWS, [5, 3], 1, lambda batch: 2)
    assert drafting == pytest.approx(2 * 4.0 + 3 * 1.1 * 1.5)


def test_the_next_request_comes_as_soon_as_one_leaves() -> None:
    # Two prompts at once; both take a step; the shorter leaves; the third one's prompt is read
    # beside a step of the longer, at what it costs among many; two steps of both.
    expected = 2 * 1.5 + 1.2 + (1.1 + 3.0 / 4) + 2 * 1.2
    assert seconds_under_load(ROWS, [5, 2, 3], 2, None) == pytest.approx(expected)


def test_answers_of_one_token_are_prompts_alone() -> None:
    assert seconds_under_load(ROWS, [1, 1, 1], 2, lambda batch: 2) == pytest.approx(2 * 2.0 + 4.0)


def test_counts_follow_the_batch() -> None:
    plan = Plan([[1, 1, 2], [2, 4, 0]], ROWS)
    # Together until the shorter ends, without drafts; then two tokens a step.
    expected = 2 * 2.0 + 2 * 1.2 + 1.1 * 1.5
    assert seconds_under_load(ROWS, [5, 3], 2, plan.count_at) == pytest.approx(expected)
    ratio = plan.expected_ratio([5, 3], 2, plan.count_at)
    assert ratio == pytest.approx((2 * 1.5 + 2 * 1.2 + 2 * 1.1) / expected)


def test_no_prediction_for_counts_that_were_not_looked_at() -> None:
    plan = Plan([[1, 4, 2]], ROWS)
    assert plan.expected_ratio([5], 1, lambda batch: 4) is None
    assert Plan([[1, 4, 2]]).expected_ratio([5], 1, lambda batch: 2) is None
