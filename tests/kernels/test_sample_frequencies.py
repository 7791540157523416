"""Candidates come as often as the ordered draw without replacement has it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from specformer_kernels.sample_candidates import (
    sample_candidates,
)
from specformer_kernels.verify import verify
from torch import Tensor


def probabilities_without_replacement(q: Tensor, count: int) -> dict[tuple[int, ...], float]:
    """Probability of each ordered draw of `count` different tokens."""
    found = {}
    for draw in itertools.permutations(range(len(q)), count):
        probability, left = 1.0, 1.0
        for token in draw:
            probability *= float(q[token]) / left
            left -= float(q[token])
        found[draw] = probability
    return found


def assert_frequencies(draws: Tensor, expected: dict[tuple[int, ...], float]) -> None:
    """Total variation within its expectation plus what chance exceeds once in 10**6.

    The mean of |count / n - p| is at most sqrt(p (1 - p) / n); one draw moves the total variation
    by at most 1 / n, so McDiarmid's inequality bounds the rest.
    """
    rows, counts = draws.unique(dim=0, return_counts=True)
    found = {tuple(row): count for row, count in zip(rows.tolist(), counts.tolist(), strict=True)}
    number = len(draws)
    assert set(found) <= set(expected)
    distance = sum(abs(found.get(draw, 0) / number - p) for draw, p in expected.items()) / 2
    bound = sum(math.sqrt(p * (1 - p) / number) for p in expected.values()) / 2
    assert distance < bound + math.sqrt(math.log(1e6) / (2 * number))


def draw_many(logits: Tensor, number: int, count: int, temperature: float, coupled: bool) -> Tensor:
    """Seeds and positions both vary: [number, count] tokens."""
    noise = {
        "temperature": torch.full((number,), temperature),
        "seeds": torch.arange(number) // 100 + 2**35,
        "positions": torch.arange(number) % 100,
    }
    rows = logits.expand(number, -1)
    return sample_candidates(rows, count, **noise, coupled=coupled).tokens


SMALL = torch.tensor([0.3, 2.0, -1.5, 1.0, -math.inf, 0.9])


@pytest.mark.parametrize("coupled", [False, True], ids=["draft", "target"])
@pytest.mark.parametrize(("count", "temperature"), [(1, 1.0), (2, 0.7), (3, 1.5)])
def test_frequencies(count: int, temperature: float, coupled: bool) -> None:
    q = (SMALL / temperature).softmax(-1)
    expected = probabilities_without_replacement(q[q > 0], count)
    possible = (q > 0).nonzero().flatten().tolist()
    expected = {tuple(possible[i] for i in draw): p for draw, p in expected.items()}
    assert_frequencies(draw_many(SMALL, 40_000, count, temperature, coupled), expected)


def test_a_biased_draw_is_noticed() -> None:
    """Independent draws in place of draws without replacement: the check must fail."""
    q = SMALL[:4].softmax(-1)
    draws = torch.multinomial(q, 80_000, replacement=True, generator=torch.Generator()).view(-1, 2)
    draws = draws[draws[:, 0] != draws[:, 1]]
    with pytest.raises(AssertionError):
        assert_frequencies(draws, probabilities_without_replacement(q, 2))


def test_drafts_are_independent_of_the_target() -> None:
    """The draft's token and the target's, drawn with one seed at one position, are unrelated."""
    number, q = 40_000, SMALL.softmax(-1)
    drafts, targets = (
        draw_many(SMALL, number, 1, 1.0, coupled=coupled)[:, 0] for coupled in (False, True)
    )
    pairs = itertools.product(range(len(q)), repeat=2)
    expected = {(a, b): float(q[a] * q[b]) for a, b in pairs}
    assert_frequencies(torch.stack((drafts, targets), dim=-1), expected)


def write_texts(number: int, is_noise_new_each_step: bool) -> tuple[Tensor, dict]:
    """Two-token texts by block verification of two drafts a step; the target's probabilities.

    Tokens 0 and 1; `target[x]` and `draft[x]` are the logits after token x, row 2 after the prompt.
    """
    target = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]).log()
    draft = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]).log()
    texts = torch.full((number, 1), 2)
    lengths, seeds = torch.ones(number, dtype=torch.int64), torch.arange(number) + 2**40
    texts = torch.cat((texts, torch.full((number, 5), -1)), dim=-1)
    while (lengths < 3).any():
        (left,) = torch.where(lengths < 3)
        root, ones = lengths[left] - 1, torch.ones(len(left))
        path = [texts[left, root]]
        for slot in range(2):
            positions = 64 * root + slot if is_noise_new_each_step else root + slot
            noise = {"temperature": ones, "seeds": seeds[left], "positions": positions}
            path.append(sample_candidates(draft[path[-1]], 1, **noise).tokens[:, 0])
        tokens = torch.stack(path, dim=-1)  # [left, 3]
        row = torch.arange(tokens.numel())
        verified = verify(
            target[tokens.flatten()],
            tokens.flatten(),
            torch.arange(0, len(row) + 1, 3, dtype=torch.int32),
            3,
            rule="block",
            temperature=ones,
            seeds=seeds[left],
            positions=(root[:, None] + torch.arange(3)).flatten(),
            draft_logits=draft[tokens.flatten()],
            draft_rows=row,
        )
        for index in range(3):
            is_token = verified.num_tokens > index
            at = left[is_token]
            texts[at, lengths[at]] = verified.tokens[is_token, index]
            lengths[at] += 1
    p = target.exp()
    pairs = itertools.product(range(2), repeat=2)
    return texts[:, 1:3], {(a, b): float(p[2, a] * p[a, b]) for a, b in pairs}


def test_block_verification_needs_new_noise_each_step() -> None:
    """It looks at drafts that it throws away: drawn again with their noise, they bias the text."""
    assert_frequencies(*write_texts(800, is_noise_new_each_step=True))
    with pytest.raises(AssertionError):
        assert_frequencies(*write_texts(800, is_noise_new_each_step=False))


@pytest.mark.statistics
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_frequencies_over_many_draws(count: int, temperature: float) -> None:
    logits = SMALL[[0, 1, 2, 3, 5]]
    expected = probabilities_without_replacement((logits / temperature).softmax(-1), count)
    assert_frequencies(draw_many(logits, 2_000_000, count, temperature, coupled=False), expected)


@pytest.mark.statistics
def test_frequencies_of_a_served_vocabulary() -> None:
    """First and second token at V = 32,000, binned: eight likely tokens and the rest."""
    vocabulary, likely = 32_000, 8
    logits = torch.cat((torch.linspace(12, 10, likely), torch.zeros(vocabulary - likely)))
    q = logits.double().softmax(-1)
    drawn = []
    for start in range(0, 8_000, 500):
        noise = {
            "temperature": torch.ones(500),
            "seeds": torch.arange(start, start + 500),
            "positions": torch.arange(start, start + 500) * 17,
        }
        rows = logits.expand(500, -1)
        drawn.append(sample_candidates(rows, 2, **noise).tokens.clamp(max=likely))
    rest = float(1 - q[:likely].sum())
    bins = [float(value) for value in q[:likely]] + [rest]
    expected = {
        (a, b): bins[a] * bins[b] / (1 - bins[a])
        for a, b in itertools.product(range(likely), range(likely + 1))
        if a != b
    }
    # After a token of the rest, what it leaves of the rest depends on it by 1e-5 of itself.
    left = 1 - float(q[-1])
    expected |= {(likely, b): rest * bins[b] / left for b in range(likely)}
    expected[(likely, likely)] = rest * (rest - float(q[-1])) / left
    assert math.isclose(sum(expected.values()), 1.0)
    assert_frequencies(torch.cat(drawn), expected)
