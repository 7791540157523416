"""The contract of `verify` and `follow` by example; probabilities are test_verify_exact.py's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from specformer_kernels.verify import Verification, follow, verify
from specformer_kernels.verify.reference import RULES
from torch import Tensor

NAN, INF = math.nan, math.inf
SAMPLED = RULES[1:]


def one_hot_logits(*winners: int, vocab_size: int = 5) -> Tensor:
    """Rows that are all but certain of their token."""
    return torch.eye(vocab_size)[list(winners)] * 50.0


def call(logits: Tensor, tokens: list[int], starts: list[int], **changes: Any) -> Verification:
    """Sampled at temperature 1 unless it is changed."""
    arguments: dict[str, Any] = {
        "rule": "rejection",
        "temperature": torch.ones(len(starts) - 1),
        "seeds": torch.arange(len(starts) - 1),
        "positions": torch.arange(len(tokens)),
        "max_rows": 4,
    }
    bounds = torch.tensor(starts, dtype=torch.int32)
    return verify(logits, torch.tensor(tokens, dtype=torch.int64), bounds, **arguments | changes)


def as_lists(result: Verification) -> list[tuple[list[int], list[int]]]:
    """Tokens and rows of each request, without the padding, which must be -1."""
    lists = []
    for tokens, count, rows in zip(*(field.tolist() for field in result), strict=True):
        assert set(tokens[count:]) | set(rows[count:]) <= {-1}
        lists.append((tokens[:count], rows[:count]))
    return lists


@pytest.mark.parametrize("rule", RULES)
def test_ragged_chains(rule: str) -> None:
    """All kept, none kept, no drafts, no rows, one kept; then a row that belongs to nobody."""
    logits = one_hot_logits(3, 1, 2, 4, 0, 2, 1, 0, 4, 3)
    tokens = [-1, 3, 1, -1, 0, -1, -1, 1, 2, 0]
    result = call(logits, tokens, [0, 3, 5, 6, 6, 9], rule=rule)
    assert as_lists(result) == [
        ([3, 1, 2], [0, 1, 2]),
        ([4], [3]),
        ([2], [5]),
        ([], []),
        ([1, 0], [6, 7]),
    ]
    assert [field.dtype for field in result] == [torch.int64, torch.int32, torch.int64]
    assert [list(field.shape) for field in result] == [[5, 4], [5], [5, 4]]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "block"])
@pytest.mark.parametrize("with_proposals", [False, True])
def test_tree(rule: str, with_proposals: bool) -> None:
    """The path runs through the second child and its only child; the first child's is not met."""
    logits = one_hot_logits(2, 0, 4, 3, 1)
    changes: dict[str, Any] = {}
    if with_proposals:
        changes = {"draft_logits": torch.zeros(1, 5), "draft_rows": torch.zeros(5).int()}
    result = call(
        logits,
        [-1, 1, 2, 0, 4],
        [0, 5],
        rule=rule,
        max_rows=5,
        parents=torch.tensor([0, 0, 0, 1, 2], dtype=torch.int32),
        max_children=2,
        **changes,
    )
    assert as_lists(result) == [([2, 4, 1], [0, 2, 4])]


def test_parents_that_are_none_make_a_row_unreachable() -> None:
    parents = torch.tensor([7, -1, 3, 0, 4, 9], dtype=torch.int32)
    result = call(one_hot_logits(*[2] * 6), [2] * 6, [0, 6], max_rows=6, parents=parents)
    assert as_lists(result) == [([2, 2], [0, 3])]


def test_rows_past_the_bound_do_not_exist() -> None:
    result = call(one_hot_logits(2, 2, 2, 2), [2, 2, 2, 2], [0, 4], max_rows=2)
    assert as_lists(result) == [([2, 2], [0, 1])]


@pytest.mark.parametrize("rule", SAMPLED)
def test_temperature_0_is_greedy_beside_sampled_requests(rule: str) -> None:
    """The first of equal logits wins; the tiny temperature tells them apart by a millionth."""
    logits = torch.tensor([[0.0, 1.0, 1.0], [2.0, 2.0, 0.0], [9.0, 9.00001, -INF], [0.0, 3.0, 1.0]])
    temperature = torch.tensor([0.0, 1e-6])
    result = call(logits, [-1, 1, -1, 1], [0, 2, 4], rule=rule, temperature=temperature)
    assert as_lists(result) == [([1, 0], [0, 1]), ([1, 1], [2, 3])]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("row", [[NAN, 0.0, 50.0], [INF, 0.0, 50.0], [-INF] * 3, [0.0, INF, NAN]])
def test_logits_that_cannot_be_sampled(rule: str, row: list[float]) -> None:
    """Reported where they are met: at the root, after a draft, but not on the way not taken."""
    bad, good = torch.tensor([row]), one_hot_logits(2, vocab_size=3)
    logits = torch.cat((bad, good, good, bad, good, bad))
    result = call(logits, [-1, 2, -1, 2, -1, 0], [0, 2, 4, 6], rule=rule, max_rows=2)
    # Without proposals block verification is the token rule; with them it reads the whole block.
    assert as_lists(result) == [([], []), ([], []), ([2], [4])]


def test_block_reads_every_row_of_the_block() -> None:
    logits = torch.cat((one_hot_logits(2, vocab_size=3), torch.full((1, 3), NAN)))
    proposals = {"draft_logits": torch.zeros(1, 3), "draft_rows": torch.zeros(2).int()}
    assert as_lists(call(logits, [-1, 0], [0, 2], rule="block", **proposals)) == [([], [])]
    # A placeholder is no part of the block.
    assert as_lists(call(logits, [-1, -1], [0, 2], rule="block", **proposals)) == [([2], [0])]


@pytest.mark.parametrize("rule", SAMPLED)
def test_forbidden_tokens_are_never_emitted(rule: str) -> None:
    logits = torch.zeros(300, 5)
    logits[:, [0, 3]] = -INF
    starts = list(range(0, 301, 3))
    result = call(logits, [0, 1, 3] * 100, starts, rule=rule)
    assert set(result.tokens.flatten().tolist()) == {-1, 1, 2, 4}


@pytest.mark.parametrize("token", [-1, -(2**31), 5, 2**31 - 1])
@pytest.mark.parametrize("rule", RULES)
def test_tokens_outside_the_vocabulary_are_placeholders(rule: str, token: int) -> None:
    """The draft behind one cannot be reached in a chain."""
    result = call(one_hot_logits(2, 2, 2), [token, token, 2], [0, 3], rule=rule)
    assert as_lists(result) == [([2], [0])]


@pytest.mark.parametrize("rule", ["rejection", "rejection_with_replacement", "block"])
@pytest.mark.parametrize(
    ("draft_row", "draft"),
    [(-1, 0.0), (1, 0.0), (0, NAN), (0, INF), (0, -INF)],
)
def test_drafts_without_a_usable_proposal_are_placeholders(
    rule: str, draft_row: int, draft: float
) -> None:
    """A draft that nothing can have proposed is not kept, however likely it is."""
    result = call(
        one_hot_logits(2, 2),
        [-1, 2],
        [0, 2],
        rule=rule,
        draft_logits=torch.full((1, 5), draft),
        draft_rows=torch.tensor([draft_row, 99]),
    )
    assert as_lists(result) == [([2], [0])]


def test_draft_of_probability_0_is_a_placeholder() -> None:
    result = call(
        one_hot_logits(2, 2),
        [-1, 2],
        [0, 2],
        draft_logits=torch.tensor([[0.0, 0.0, -INF, 0.0, 0.0]]),
        draft_rows=torch.tensor([0, 0]),
    )
    assert as_lists(result) == [([2], [0])]


def test_follow() -> None:
    """A tree, a token that could not be sampled, and one that could not but is not met."""
    sampled = torch.tensor([4, 7, 9, 8, -1, 5, 5, -1])
    tokens = torch.tensor([0, 3, 4, 9, 0, 5, 0, 6])
    starts = torch.tensor([0, 4, 6, 8], dtype=torch.int32)
    parents = torch.tensor([0, 0, 0, 2, 0, 0, 0, 0], dtype=torch.int32)
    result = follow(sampled, tokens, starts, 4, parents)
    assert as_lists(result) == [([4, 9, 8], [0, 2, 3]), ([], []), ([5], [6])]
    assert as_lists(follow(sampled[:4], tokens[:4], starts[:2], 4)) == [([4], [0])]


@pytest.mark.parametrize("rule", RULES)
def test_no_requests_and_no_rows(rule: str) -> None:
    assert as_lists(call(torch.zeros(0, 5), [], [0], rule=rule)) == []
    assert as_lists(call(torch.zeros(0, 5), [], [0, 0], rule=rule)) == [([], [])]


VALID: dict[str, Any] = {
    "logits": torch.zeros(3, 5),
    "tokens": torch.zeros(3, dtype=torch.int64),
    "row_start_loc": torch.tensor([0, 3], dtype=torch.int32),
    "max_rows": 3,
    "rule": "rejection",
    "parents": torch.zeros(3, dtype=torch.int32),
    "temperature": torch.ones(1),
    "seeds": torch.zeros(1, dtype=torch.int64),
    "positions": torch.zeros(3, dtype=torch.int64),
    "draft_logits": torch.zeros(2, 5),
    "draft_rows": torch.zeros(3, dtype=torch.int32),
    "max_children": 2,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rule", "typical"),
        ("rule", "block"),  # with parents
        ("logits", torch.zeros(3, 5, 1)),
        ("logits", torch.zeros(3, 5).long()),
        ("logits", torch.zeros(5, 3).T),
        ("logits", torch.zeros(3, 0)),
        ("tokens", torch.zeros(2).long()),
        ("tokens", torch.zeros(3)),
        ("row_start_loc", torch.zeros(0).int()),
        ("row_start_loc", torch.tensor([0, 3])),
        ("max_rows", 0),
        ("max_rows", 66),
        ("parents", torch.zeros(3).long()),
        ("temperature", None),
        ("temperature", torch.ones(2)),
        ("temperature", torch.ones(1).double()),
        ("seeds", None),
        ("seeds", torch.zeros(1).int()),
        ("positions", None),
        ("positions", torch.zeros(2).long()),
        ("draft_logits", None),
        ("draft_logits", torch.zeros(2, 4)),
        ("draft_rows", None),
        ("draft_rows", torch.zeros(3)),
        ("max_children", None),
        ("max_children", 0),
    ],
)
def test_broken_contract_is_named(name: str, value: Any) -> None:
    verify(**VALID)
    named = "parents" if value == "block" else name
    with pytest.raises(ValueError, match=f"^{named}: expected .* found |^{named}: expected None"):
        verify(**VALID | {name: value})


@pytest.mark.parametrize(
    "sampled", [torch.zeros(3), torch.zeros(3, 1).long(), torch.zeros(2).long()]
)
def test_broken_contract_of_follow_is_named(sampled: Tensor) -> None:
    arguments = [VALID[name] for name in ("tokens", "row_start_loc", "max_rows", "parents")]
    with pytest.raises(ValueError, match=r"^(sampled|tokens): expected .* found "):
        follow(sampled, *arguments)
