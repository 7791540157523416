"""Synthetic acceptance on V1's CPU kernels, which vLLM leaves unfinished."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import synthetic
from support.engines import engine, prompts
from vllm_specformer.engine.patches.cpu_synthetic import accept

# Three requests with three drafts, none, and two.
SUMS = torch.tensor([3, 3, 5])
DRAFTS = torch.tensor([10, 11, 12, 20, 21])
TARGETS = torch.tensor([30, 31, 32, 40, 41])
BONUS = torch.tensor([[50], [51], [52]])
RATES = torch.tensor([0.9, 0.5, 0.5])


def accepted(uniform: list[float], drafts: Tensor = DRAFTS, mine: str = "111") -> list[list[int]]:
    output = torch.full((3, 4), -1)
    rows = torch.tensor([c == "1" for c in mine])
    accept(output, SUMS, drafts, TARGETS, BONUS, rows, torch.tensor(uniform), RATES)
    return [[t for t in row if t >= 0] for row in output.tolist()]


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [
        ([0.1, 0.1, 0.1, 0.1, 0.1], [[10, 11, 12, 50], [51], [20, 21, 52]]),
        ([0.1, 0.1, 0.6, 0.89, 0.49], [[10, 11, 32], [51], [20, 21, 52]]),
        # The first number that fails decides, whatever follows.
        ([0.9, 0.1, 0.1, 0.1, 0.5], [[30], [51], [20, 41]]),
    ],
)
def test_the_rule(uniform: list[float], expected: list[list[int]]) -> None:
    assert accepted(uniform) == expected


def test_a_placeholder_is_never_accepted() -> None:
    drafts = torch.tensor([10, -1, 12, -1, 21])
    assert accepted([0.0] * 5, drafts) == [[10, 31], [51], [40]]


def test_other_requests_are_left_alone() -> None:
    assert accepted([0.0] * 5, mine="010") == [[], [51], []]
    assert accepted([0.0] * 5, mine="101") == [[10, 11, 12, 50], [], [20, 21, 52]]


@pytest.mark.slow
def test_served() -> None:
    with engine(synthetic.SPECULATIVE) as llm:
        synthetic.assert_as_asked(*synthetic.kept_per_position(llm, prompts()[:8], 24))
