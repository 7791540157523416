"""Every rule emits the target's distribution exactly: all drafts and all decisions, enumerated.

The rules that are shipped run on float64 logits; only their noise is replaced, by a script that
takes one way through the random decisions and notes the others.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from specformer_kernels.verify import reference, rules
from torch import Tensor

from support.verify_toys import (
    Batch,
    Candidates,
    History,
    Model,
    distinct,
    fixed_model,
    independent,
    most_likely,
    sequence_probabilities,
    total_variation,
    toy_model,
)

# Sums of some thousand float64 products of probabilities.
EXACT = 1e-12
# float32 probabilities have a relative error of 6e-8, and a path multiplies a dozen of them.
EXACT_FLOAT32 = 2e-6
# What a wrong rule must be off by at least: far from rounding, and from the sampling error of any
# test that looks at frequencies.
WRONG = 0.01


class Script:
    """One way through the random decisions: a given start, then always the first option."""

    def __init__(self, start: tuple[int, ...]) -> None:
        self.start = start
        self.taken: tuple[int, ...] = ()
        self.probability = 1.0
        self.branches: list[tuple[int, ...]] = []

    def choose(self, probabilities: Sequence[float]) -> int:
        options = [i for i, probability in enumerate(probabilities) if probability > 0]
        if len(self.taken) < len(self.start):
            choice = self.start[len(self.taken)]
        else:
            choice = options[0]
            self.branches += [(*self.taken, other) for other in options[1:]]
        self.taken += (choice,)
        self.probability *= probabilities[choice]
        return choice

    def draw(self, weights: Tensor, history: History = ()) -> int:
        return self.choose((weights.double() / weights.double().sum()).tolist())

    def accept(self, probability: float, node: int) -> bool:
        assert 0.0 <= probability <= 1.0
        return self.choose([probability, 1.0 - probability]) == 0

    def sample(self, weights: Tensor, position: int) -> int:
        return self.draw(weights)

    def sample_target(self, scores: Tensor, position: int) -> int:
        return self.draw(scores.softmax(-1))


def enumerate_outcomes(experiment: Callable[[Script], History]) -> dict[History, float]:
    """Probability of everything the experiment can return."""
    outcomes: dict[History, float] = defaultdict(float)
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        script = Script(waiting.pop())
        outcomes[experiment(script)] += script.probability
        waiting += script.branches
    return outcomes


@dataclass(frozen=True)
class Setting:
    """One draft and one target to enumerate."""

    rule: str
    widths: Sequence[int]
    candidates: Candidates
    target: Model
    draft: Model
    one_hot: bool = False
    shared: bool = False
    dtype: torch.dtype = torch.float64

    def outcomes(self) -> dict[History, float]:
        """Probability of each sequence of tokens that one step can emit."""

        def step(script: Script) -> History:
            batch = Batch(self.target, self.draft, self.widths, self.candidates, self.shared)
            batch.add((), script.draw)
            patch.setattr(reference, "KeyedNoise", lambda seed, position: script)
            arguments = batch.arguments(self.one_hot, self.dtype)
            seeds = torch.zeros(1, dtype=torch.int64)
            found = reference.verify(**arguments, rule=self.rule, seeds=seeds)
            return tuple(found.tokens[0, : found.num_tokens[0]].tolist())

        with pytest.MonkeyPatch.context() as patch:
            return enumerate_outcomes(step)

    def error(self) -> float:
        """Total variation between the target and a step that the target itself carries on."""
        length = len(self.widths) + 1
        expected = sequence_probabilities(self.target, length)
        found = torch.zeros_like(expected)
        for tokens, probability in self.outcomes().items():
            rest = sequence_probabilities(self.target, length - len(tokens), tokens)
            found[tokens] += probability * rest
        return total_variation(found, expected)


def expected_tokens(outcomes: dict[History, float]) -> float:
    return sum(len(tokens) * probability for tokens, probability in outcomes.items())


TARGET, DRAFT = toy_model(3, seed=1), toy_model(3, seed=2)
CHAINS = [(1,), (1, 1), (1, 1, 1)]
SAMPLED = ["rejection", "rejection_with_replacement", "block", "coupled"]


@pytest.mark.parametrize("widths", CHAINS)
@pytest.mark.parametrize("rule", SAMPLED)
def test_chains(rule: str, widths: Sequence[int]) -> None:
    assert Setting(rule, widths, independent, TARGET, DRAFT).error() < EXACT


@pytest.mark.parametrize("rule", SAMPLED)
def test_impossible_tokens(rule: str) -> None:
    """The target refuses what the draft proposes, and wants what it never proposes."""
    target, draft = toy_model(4, seed=3, zeros=1), toy_model(4, seed=4, zeros=2)
    assert Setting(rule, (1, 1), independent, target, draft).error() < EXACT


# Enumerating the larger trees takes some ten seconds each.
LARGER = [pytest.param(widths, marks=pytest.mark.statistics) for widths in [(2, 2), (2, 1, 1)]]


@pytest.mark.parametrize("widths", [(2,), (3,), (1, 2), (2, 1), *LARGER])
@pytest.mark.parametrize(
    ("rule", "candidates"),
    [
        ("rejection", distinct),
        # Duplicates are dropped, which leaves draws without replacement.
        ("rejection", independent),
        ("rejection_with_replacement", independent),
        ("coupled", most_likely),
    ],
)
def test_trees(rule: str, candidates: Candidates, widths: Sequence[int]) -> None:
    assert Setting(rule, widths, candidates, TARGET, DRAFT).error() < EXACT


@pytest.mark.parametrize(
    ("rule", "candidates"),
    [("rejection", distinct), ("rejection_with_replacement", independent)],
)
def test_slots_that_share_their_candidates(rule: str, candidates: Candidates) -> None:
    draft = toy_model(4, seed=5, by_depth=True)
    setting = Setting(rule, (2, 2), candidates, toy_model(4, seed=6), draft, shared=True)
    assert setting.error() < EXACT


@pytest.mark.parametrize("zeros", [0, 4])
def test_larger_vocabulary(zeros: int) -> None:
    """Four impossible drafts of six leave two to draw: the third is a placeholder."""
    target, draft = toy_model(6, seed=7, zeros=1), toy_model(6, seed=8, zeros=zeros)
    assert Setting("rejection", (3,), distinct, target, draft).error() < EXACT


@pytest.mark.parametrize(
    ("rule", "widths", "candidates"),
    [
        *itertools.product(SAMPLED[:3], [(1, 1)], [most_likely, independent]),
        *itertools.product(SAMPLED[:2], [(2,), (3,), (2, 2)], [most_likely]),
        *itertools.product(SAMPLED[:2], [(3,), (2, 1)], [independent]),
    ],
)
def test_drafts_without_a_distribution(
    rule: str, widths: Sequence[int], candidates: Candidates
) -> None:
    """Any candidates will do, even random ones that repeat."""
    target, draft = toy_model(4, seed=9, zeros=1), toy_model(4, seed=10)
    assert Setting(rule, widths, candidates, target, draft, one_hot=True).error() < EXACT


def with_gaps(draw: Callable, q: Tensor, history: History, count: int) -> list[int]:
    """No drafts after the first token; a placeholder before the last of several."""
    if len(history) == 1:
        return [-1] * count
    drafts = distinct(draw, q, history, max(1, count - 1))
    return [*drafts[:-1], -1, drafts[-1]] if count > 1 else drafts


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize(
    ("rule", "widths"), [("block", (1, 1, 1)), ("rejection", (1, 1, 1)), ("rejection", (3,))]
)
def test_placeholders(rule: str, widths: Sequence[int], one_hot: bool) -> None:
    setting = Setting(rule, widths, with_gaps, TARGET, DRAFT, one_hot)
    assert setting.error() < EXACT
    assert max(map(len, setting.outcomes())) == 2


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([1.0, 0.0, 0.0], [0.2, 0.5, 0.3]),
        ([0.2, 0.5, 0.3], [0.0, 1.0, 0.0]),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]),
        ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]),
        ([0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        ([0.5, 0.4, 0.1], [1 - 2e-7, 1.5e-7, 0.5e-7]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["rejection", "rejection_with_replacement", "block"])
def test_extreme_distributions(
    rule: str, dtype: torch.dtype, p: list[float], q: list[float]
) -> None:
    candidates = distinct if rule == "rejection" else independent
    widths = (1, 1) if rule == "block" else (2,)
    target, draft = fixed_model(p, [0.3, 0.3, 0.4]), fixed_model(q)
    error = Setting(rule, widths, candidates, target, draft, dtype=dtype).error()
    assert error < (EXACT if dtype == torch.float64 else EXACT_FLOAT32)


@pytest.mark.parametrize("seed", range(5))
def test_block_emits_more_than_the_token_rule(seed: int) -> None:
    models = toy_model(3, seed=100 + seed), toy_model(3, seed=200 + seed)
    block, token = (
        expected_tokens(Setting(rule, (1, 1, 1), independent, *models).outcomes())
        for rule in ("block", "rejection")
    )
    assert block > token + 1e-3


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("rule", "candidates"),
    [
        ("rejection", distinct),
        ("rejection", independent),
        ("rejection_with_replacement", independent),
        ("coupled", independent),
    ],
)
def test_acceptance_of_candidates(rule: str, candidates: Candidates, count: int) -> None:
    """No rule accepts more than 1 + min over token sets H of p(H) - Pr[all drafts in H].

    That is the optimum over all exact rules (Hu et al., 2502.18779). One draft attains it.
    """
    target, draft = toy_model(5, seed=11), toy_model(5, seed=12)
    setting = Setting(rule, (count,), candidates, target, draft)
    found = expected_tokens(setting.outcomes()) - 1.0

    p, q = target(()), draft(())
    draws = enumerate_outcomes(lambda script: tuple(candidates(script.draw, q, (), count)))
    bound = 1.0 + min(
        float(p[list(inside)].sum())
        - sum(chance for tokens, chance in draws.items() if set(tokens) <= set(inside))
        for size in range(len(p) + 1)
        for inside in itertools.combinations(range(len(p)), size)
    )
    assert found < bound + EXACT
    if count == 1 and rule != "coupled":
        assert found == pytest.approx(bound, abs=EXACT)
        assert found == pytest.approx(float(torch.minimum(p, q).sum()), abs=EXACT)


def test_fixed_candidates_are_accepted_with_their_mass() -> None:
    target, draft = toy_model(5, seed=13), toy_model(5, seed=14)
    mass = float(target(())[draft(()).topk(3).indices].sum())
    for rule in ("rejection", "coupled"):
        setting = Setting(rule, (3,), most_likely, target, draft, one_hot=True)
        assert expected_tokens(setting.outcomes()) == pytest.approx(1.0 + mass, abs=EXACT)


# From here on: what must NOT be exact, so that the checker has to notice.


def only_largest(model: Model, count: int) -> Model:
    """The softmax of the `count` largest logits alone."""

    def restricted(history: History) -> Tensor:
        q = model(history)
        kept = torch.where(q >= q.topk(count).values[-1], q, 0.0)
        return kept / kept.sum()

    return restricted


def test_fixed_candidates_under_a_distribution() -> None:
    """MCSD at draft temperature 0: the top tokens, verified as if drawn from their softmax."""
    errors = []
    for seed in range(10):
        target, draft = toy_model(6, seed=300 + seed), toy_model(6, seed=400 + seed)
        setting = Setting("rejection", (3,), most_likely, target, only_largest(draft, 3))
        errors.append(setting.error())
        drawn = Setting("rejection", (3,), distinct, target, only_largest(draft, 3))
        assert drawn.error() < EXACT
    assert min(errors) > WRONG
    assert sum(errors) / len(errors) > 0.1


def dropping_unlikely(draw: Callable, q: Tensor, history: History, count: int) -> list[int]:
    return [x if q[x] > 0.3 else -1 for x in independent(draw, q, history, count)]


def hiding_the_second(draw: Callable, q: Tensor, history: History, count: int) -> list[int]:
    return [-1 if i == 1 else x for i, x in enumerate(distinct(draw, q, history, count))]


@pytest.mark.parametrize(
    ("rule", "widths", "candidates", "one_hot"),
    [
        # Drawn one way, verified as if drawn another way.
        ("rejection_with_replacement", (2,), distinct, False),
        ("rejection", (1, 1), most_likely, False),
        ("block", (1, 1), most_likely, False),
        # A draft that is dropped for its value, or after it shaped the next draw.
        ("rejection", (1, 1), dropping_unlikely, False),
        ("rejection_with_replacement", (2,), dropping_unlikely, False),
        ("block", (1, 1), dropping_unlikely, False),
        ("rejection", (3,), hiding_the_second, False),
    ],
)
def test_drafts_that_break_the_contract(
    rule: str, widths: Sequence[int], candidates: Candidates, one_hot: bool
) -> None:
    assert Setting(rule, widths, candidates, TARGET, DRAFT, one_hot).error() > WRONG


BLOCK = Setting("block", (1, 1, 1), independent, TARGET, DRAFT)
TOKEN = Setting("rejection", (1, 1), independent, TARGET, DRAFT)
DISTINCT = Setting("rejection", (3,), distinct, toy_model(4, seed=16), toy_model(4, seed=17))
REPEATED = Setting("rejection_with_replacement", (3,), independent, TARGET, DRAFT)
ONE_HOT = Setting("rejection", (2,), most_likely, TARGET, DRAFT, one_hot=True)
# The second draft has a probability of 2e-7 to begin with: 1 - q of the first, in float32, is off
# by a sixth.
PEAKED = Setting(
    rule="rejection",
    widths=(2,),
    candidates=distinct,
    target=fixed_model([0.5, 0.4, 0.1]),
    draft=fixed_model([1 - 2e-7, 1.5e-7, 0.5e-7]),
    dtype=torch.float32,
)


@pytest.mark.parametrize(
    ("setting", "right", "wrong"),
    [
        (TOKEN, "(p - b * q).clamp", "p.clamp"),
        (TOKEN, "b += weight_sum / m", "b += 0.5"),
        (DISTINCT, "b += weight_sum / m", "b += weight_sum"),
        (DISTINCT, "b += weight_sum / m", "b += 1.0"),
        (DISTINCT, "float(weights[token]) * m /", "float(weights[token]) /"),
        (DISTINCT, "weight_sum * float(q[token])", "float(q[token])"),
        (PEAKED, "m = float(unseen.sum())", "m -= float(q[token])"),
        (REPEATED, "b += weight_sum / m", "b += 1.0"),
        (REPEATED, "or unseen[token] < NEGLIGIBLE", "or weights[token] == 0"),
        (ONE_HOT, "share / left", "share"),
        (ONE_HOT, "weights[token] = 0.0", "pass"),
        (BLOCK, "residuals[kept], p)", "_residual(p, request.proposal(kept), 1.0), p)"),
        (BLOCK, "residuals[i].sum()", "_residual(p, request.proposal(i), 1.0).sum()"),
        (BLOCK, "mass / both if both > 0.0 else 1.0", "joint[i]"),
        (BLOCK, "mass / both if both > 0.0 else 1.0", "min(1.0, joint[i] / joint[i - 1])"),
        (BLOCK, "            kept = i", "            kept = i\n        else:\n            break"),
    ],
)
def test_broken_rules(
    setting: Setting, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of one expression of the rules shows in the distribution."""
    source = inspect.getsource(rules)
    assert right in source
    broken = types.ModuleType(rules.__name__)
    exec(source.replace(right, wrong), broken.__dict__)
    monkeypatch.setattr(reference, "rules", broken)
    assert setting.error() > WRONG
