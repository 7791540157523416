"""Frequencies of what the keyed noise emits: `make test-statistics`, some minutes.

test_verify_exact.py shows that the rules are right if their noise is ideal; this shows that the
noise is good enough, and keyed so that no step knows anything of the steps before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from specformer_kernels.noise import Stream, gumbel, uniform
from specformer_kernels.verify import reference, verify
from torch import Tensor

from support.verify_toys import (
    Candidates,
    Draw,
    History,
    Model,
    distinct,
    fixed_model,
    frequencies,
    generate,
    independent,
    most_likely,
    moved_to,
    sampling_bound,
    sequence_probabilities,
    total_variation,
    toy_model,
)

pytestmark = pytest.mark.statistics

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TARGET, DRAFT = toy_model(3, seed=1), toy_model(3, seed=2)


def for_all_seeds(function: Callable[..., Tensor], seeds: Tensor) -> Callable[..., Tensor]:
    """A noise function that draws for all seeds at once, since a call costs more than a draw."""

    @cache
    def table(position: int, size: int, stream: Stream, dtype: torch.dtype) -> Tensor:
        return function(seeds[:, None], torch.tensor(position), torch.arange(size), stream, dtype)

    def draw(
        seed: Tensor,
        position: Tensor,
        index: Tensor,
        stream: Stream,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        assert torch.equal(index, torch.arange(len(index)))
        assert seeds[seed] == seed
        return table(int(position), len(index), stream, dtype)[seed]

    return draw


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    seeds = torch.arange(100_000)
    monkeypatch.setattr(reference, "uniform", for_all_seeds(uniform, seeds))
    monkeypatch.setattr(reference, "gumbel", for_all_seeds(gumbel, seeds))
    return seeds


def deviations(texts: Tensor, target: Model) -> list[tuple[float, float]]:
    """Total variation from the target, and its bound: first tokens, second tokens, pairs."""
    expected = sequence_probabilities(target, 2)
    found = frequencies(texts, len(expected))
    views = [(found.sum(1), expected.sum(1)), (found.sum(0), expected.sum(0)), (found, expected)]
    return [(total_variation(a, b), sampling_bound(b, len(texts))) for a, b in views]


def is_exact(texts: Tensor, target: Model) -> bool:
    return all(deviation < bound for deviation, bound in deviations(texts, target))


@pytest.mark.parametrize(
    ("rule", "widths", "candidates", "one_hot"),
    [
        ("rejection", (1, 1), independent, False),
        ("rejection", (2, 1), distinct, False),
        ("rejection", (2, 1), most_likely, True),
        ("rejection_with_replacement", (2, 1), independent, False),
        ("block", (1, 1, 1), independent, False),
        ("coupled", (2, 1), distinct, False),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_small_vocabulary(
    rule: str,
    widths: Sequence[int],
    candidates: Candidates,
    one_hot: bool,
    device: str,
    seeds: Tensor,
) -> None:
    arguments = (moved_to(device, verify), rule, TARGET, DRAFT, widths, candidates)
    texts = generate(*arguments, seeds=seeds, length=2, one_hot=one_hot)
    assert is_exact(texts, TARGET)


def by_history(start: Sequence[float], after: dict[History, Sequence[float]]) -> Model:
    """The distribution of each history that is named, and the one of the start elsewhere."""
    return lambda history: torch.tensor(after.get(history, start), dtype=torch.float64)


# The worst case of each trap: target and draft. Where half of the blocks are rejected at the root,
# token 1 is emitted.
SEES_ACCEPTANCE = by_history([0.5, 0.5], {(0,): [1, 0], (1, 0): [0, 1]}), fixed_model([1, 0])
SEES_DRAFT = by_history([0.5, 0.5], {(0,): [1, 0]}), fixed_model([1, 0], [0.5, 0.5])
# Token 0 is drafted half of the time and always rejected; it says that token 1 had little noise.
SEES_RESIDUAL = fixed_model([0, 0.6, 0.4]), fixed_model([0.5, 0.5, 0])


class AtTheParent(reference.KeyedNoise):
    """Acceptance keyed by the parent's position, which the next step may meet again."""

    def accept(self, probability: float, node: int) -> bool:
        position = torch.tensor(self.root_position + node - 1)
        return float(uniform(self.seed, position, torch.tensor(0), Stream.ACCEPT)) <= probability


@pytest.mark.parametrize(("noise", "exact"), [(reference.KeyedNoise, True), (AtTheParent, False)])
def test_block_needs_fresh_acceptance(
    noise: type, exact: bool, seeds: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejecting a block says something about the noise of positions that are not emitted yet."""
    monkeypatch.setattr(reference, "KeyedNoise", noise)
    arguments = ("block", *SEES_ACCEPTANCE, (1, 1), independent)
    texts = generate(reference.verify, *arguments, seeds=seeds[:10_000], length=2)
    assert is_exact(texts, SEES_ACCEPTANCE[0]) == exact


def keyed_draw(seed: Tensor, stream: Stream) -> Draw:
    """Drafts from counter-based noise, keyed by the position they are drawn at."""

    def draw(weights: Tensor, history: History) -> int:
        tokens = torch.arange(len(weights))
        noise = reference.gumbel(seed, torch.tensor(len(history)), tokens, stream)
        return int((weights.log() + noise).argmax())

    return draw


@pytest.mark.parametrize(
    ("rule", "models", "stream", "exact"),
    [
        ("rejection", SEES_RESIDUAL, Stream.DRAFT, True),
        ("rejection", SEES_RESIDUAL, Stream.RESIDUAL, False),
        ("rejection", SEES_DRAFT, Stream.DRAFT, True),
        # A block's decision depends on drafts after the last token it emits, so the next step must
        # not draw them from the same noise again.
        ("block", SEES_DRAFT, Stream.DRAFT, False),
        ("coupled", SEES_RESIDUAL, Stream.TARGET, True),
    ],
)
def test_noise_of_the_draft(
    rule: str, models: tuple[Model, Model], stream: Stream, exact: bool, seeds: Tensor
) -> None:
    seeds = seeds[:10_000]
    draws = [keyed_draw(seed, stream) for seed in seeds]
    arguments = (rule, *models, (1, 1), independent)
    texts = generate(reference.verify, *arguments, seeds=seeds, length=2, draws=draws)
    assert is_exact(texts, models[0]) == exact


def zipf_logits(vocab_size: int, seed: int) -> Tensor:
    """Logits like a language model's: few tokens carry most of the mass, many the rest."""
    ranks = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0)) + 1.0
    noise = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))
    return -1.2 * ranks.log() + noise


def into_bins(weights: Tensor, p: Tensor) -> Tensor:
    """[V] summed over the 24 most likely tokens by themselves, and 16 ranges of the others."""
    bins = torch.arange(len(p)) * 16 // len(p)
    bins[p.topk(24).indices] = torch.arange(16, 40)
    return torch.zeros(40, dtype=torch.float64).index_add(0, bins, weights.double())


# A draw from a large vocabulary takes the CPU milliseconds.
@pytest.mark.parametrize(("vocab_size", "count"), [(32_000, 5_000), (151_936, 2_000)])
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
@pytest.mark.parametrize("device", DEVICES)
def test_large_vocabulary(device: str, rule: str, vocab_size: int, count: int) -> None:
    """Every request has the same two rows of logits, so that they need no memory each."""
    count = count if device == "cpu" else 200_000
    target, draft = zipf_logits(vocab_size, 1), zipf_logits(vocab_size, 2)
    p, q = target.double().softmax(-1), draft.double().softmax(-1)
    generator = torch.Generator().manual_seed(0)
    # Independent pairs make a chain; with the equal ones dropped they would make siblings.
    drafts = torch.multinomial(q, 2 * count, replacement=True, generator=generator).view(-1, 2)
    tokens = torch.cat((torch.full((count, 1), -1), drafts), dim=1).flatten()
    is_tree = rule == "rejection"
    result = moved_to(device, verify)(
        logits=target.expand(3 * count, -1),
        tokens=tokens,
        row_start_loc=torch.arange(0, 3 * count + 1, 3, dtype=torch.int32),
        max_rows=3,
        rule=rule,
        parents=torch.zeros(3 * count, dtype=torch.int32) if is_tree else None,
        temperature=torch.ones(count),
        seeds=torch.arange(count),
        positions=torch.arange(3 * count),
        draft_logits=draft[None],
        draft_rows=torch.zeros(3 * count, dtype=torch.int32),
        max_children=2,
    )
    emitted = result.tokens.cpu()
    # A second token that is an accepted draft's successor is a draw from the target like the first.
    for column in (emitted[:, 0], emitted[:, 1][emitted[:, 1] >= 0]):
        found = into_bins(torch.bincount(column, minlength=vocab_size) / len(column), p)
        expected = into_bins(p, p)
        assert total_variation(found, expected) < sampling_bound(expected, len(column))
