"""Adaptive verification and thresholds keep the target's law: all decisions are enumerated.

Two steps of a toy request beside another one, through our drafting of a head with a Markov term,
vLLM's estimator, and its manager's budget and ranking. Drafts are verified by vLLM's standard rule,
in exact fractions. Both steps' drafts of one position meet the same noise, as in vLLM.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401  what stands for CUDA's streams on a CPU
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode import adaptive_verification
from vllm.v1.worker.gpu.spec_decode.acceptance_estimator import OnlineAcceptanceEstimator
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import (
    AdaptiveVerificationManager,
    build_cost_tables_from_curves,
)

from vllm_specformer.engine.confidence.cut_v2 import ThresholdManager
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

K, TOKENS = 3, 3
CELLS = 4  # all draft probabilities are multiples of a quarter, so a draft's noise has four values
# Probabilities of a token after each token: the target's p and the head's q.
P = [[3, 4, 1], [1, 2, 5], [4, 2, 2]]
Q = [[3, 1, 0], [1, 1, 2], [0, 1, 3]]
P_OF = [[Fraction(n, 8) for n in row] for row in P]
Q_OF = [[Fraction(n, CELLS) for n in row] for row in Q]
FIRST = 0  # the text's last token before the first step
SLOPE, INTERCEPT = 1.0, 1.0  # of the estimator, as if fitted
WRONG = Fraction(1, 1000)

Text = tuple[int, ...]
Known = tuple[float, ...]  # chances of a step's slots
Confidences = Callable[[int, Text], Known]  # by the token before a step and its drafts


@dataclass(frozen=True)
class Setting:
    """What vLLM's manager knows beside our drafts.

    Attributes:
        row_cost: of the target's steps, in what a step costs without rows.
        beside: chances of the other request's slots, step by step.
        threshold: of chances, which then decides in place of costs.
    """

    row_cost: float
    beside: tuple[Known, Known]
    threshold: float | None = None


# In the second the other request has become sure, so that what is left for ours hangs on the
# budget.
EVEN = Setting(0.7, ((0.62, 0.4, 0.3), (0.62, 0.4, 0.3)))
CROWDED = Setting(0.5, ((0.95, 0.2, 0.2), (0.97, 0.97, 0.97)))
# With thresholds, where a step's number is that of chances of the step before: the other's drafts
# leave room for a likely first draft of ours alone; and for one if three drafts were sure.
SURE = Setting(0, ((0.62, 0.4, 0.3), (0.62, 0.9, 0.9)), 0.5)
SURE_CROWDED = Setting(0, ((0.3, 0.2, 0.2), (0.97, 0.97, 0.5)), 0.65)


class ToySpeculator(SpecFormerSpeculator):
    """Our drafting alone; tokens are drawn as the test says."""

    _is_adaptive = True

    def __init__(self, draws: Text, draws_apart: bool = True) -> None:
        self.draws = draws
        self.num_speculative_steps = K
        q = torch.tensor(Q, dtype=torch.float32) / CELLS
        head = SimpleNamespace(
            biased=lambda own, slot, tokens, _: own + q.log()[tokens], to_tokens=lambda x: x
        )
        self.model = SimpleNamespace(head=head)
        self.draft_logits = torch.zeros(1) if draws_apart else None
        self.draft_tokens = torch.zeros(1, K, dtype=torch.int64)
        self.draft_token_confidence_probs = torch.zeros(1, K)
        self.temperature = torch.ones(1)
        self.sample_idx_mapping = torch.zeros(K, dtype=torch.int64)
        self.sample_col = torch.arange(K, dtype=torch.int32)
        self.acceptance_estimator = OnlineAcceptanceEstimator(1, K, torch.device("cpu"))
        self.acceptance_estimator.slope.fill_(SLOPE)
        self.acceptance_estimator.intercepts.fill_(INTERCEPT)

    def _sample(self, logits: Tensor, num_reqs: int, slots: slice) -> Tensor:
        return torch.tensor([self.draws[slots.start]])


def draft(before: int, draws: Text, **changes: bool) -> Known:
    """Confidences of a step after token `before` that draws these tokens."""
    ours = ToySpeculator(draws, **changes)
    ours._sample_in_order(torch.zeros(1, K, TOKENS), None, torch.tensor([before]))
    assert ours.draft_tokens[0].tolist() == list(draws)
    return tuple(float(c) for c in ours.draft_token_confidence_probs[0])


@cache
def as_shipped(before: int, draws: Text) -> Known:
    return draft(before, draws)


@cache
def along_what_is_drawn(before: int, draws: Text) -> Known:
    """A slot's largest probability after the tokens drawn before it, as drafts are made."""
    return draft(before, draws, draws_apart=False)


@cache
def of_the_drawn_token(before: int, draws: Text) -> Known:
    """What nobody may do: the probability of the very token that was drawn."""
    return tuple(float(Q_OF[a][b]) for a, b in zip((before, *draws), draws, strict=False))


@cache
def admitted(steps: tuple[Known, ...], setting: Setting) -> int:
    """Drafts of our request that are verified in the last of these steps, by vLLM's manager.

    A step is known by its confidences; beside ours there is always another request's.
    """
    states: Any = SimpleNamespace(
        num_speculative_steps=K,
        device=torch.device("cpu"),
        max_num_reqs=2,
        max_num_batched_tokens=16,
        req_id_to_index={"ours": 0, "other": 1},
        num_computed_tokens_np=np.ones(2, dtype=np.int32),
        prefill_len=SimpleNamespace(np=np.ones(2, dtype=np.int32)),
    )
    layout = states, torch.zeros(3, dtype=torch.int32), 1, 10**6
    manager: AdaptiveVerificationManager
    if setting.threshold is not None:
        manager = ThresholdManager(((1, 64, setting.threshold),), *layout)
    else:
        manager, rows = AdaptiveVerificationManager(*layout), range(1, 17)
        manager.cost_tables = build_cost_tables_from_curves(
            [(1, 0.0), (2, 0.0)], [(n, 1 + setting.row_cost * n) for n in rows], 2, rows[-1]
        )
    batch: Any = SimpleNamespace(num_reqs=2, idx_mapping=torch.arange(2))
    manager.add_request(0)
    manager.add_request(1)
    names, last = ["ours", "other"], 0
    for confidences, beside in zip(steps, setting.beside, strict=False):
        manager.record_confidences(torch.tensor([confidences, beside]), batch)
        manager.get_num_tokens({name: K + 1 for name in names}, {name: [0] * K for name in names})
        starts, _, _ = manager.reallocate_drafts(names, torch.arange(2))
        last = int(starts[1]) - 1
    return last


class Script:
    """One way through the random decisions; then always the first option. See test_verify_exact."""

    def __init__(self, start: tuple[int, ...]) -> None:
        self.start, self.taken = start, ()
        self.probability = Fraction(1)
        self.branches: list[tuple[int, ...]] = []

    def choose(self, probabilities: list[Fraction]) -> int:
        options = [i for i, p in enumerate(probabilities) if p]
        if len(self.taken) < len(self.start):
            choice = self.start[len(self.taken)]
        else:
            choice = options[0]
            self.branches += [(*self.taken, other) for other in options[1:]]
        self.taken: tuple[int, ...] = (*self.taken, choice)
        self.probability *= probabilities[choice]
        return choice


def verified(script: Script, before: int, drafts: Text) -> Text:
    """vLLM's standard rule: tokens that a step adds to the text."""
    text: Text = ()
    for x in drafts:
        p, q = P_OF[before], Q_OF[before]
        accept = min(Fraction(1), p[x] / q[x])
        if script.choose([accept, 1 - accept]):
            left = [max(Fraction(0), a - b) for a, b in zip(p, q, strict=True)]
            return (*text, script.choose([n / sum(left) for n in left]))
        text, before = (*text, x), x
    return (*text, script.choose(P_OF[before]))


def two_steps(
    script: Script, confidences: Confidences, setting: Setting, tight: Counter[int]
) -> Text:
    """The first two tokens; `tight` counts how many drafts of a second step are verified."""
    text: Text = (FIRST,)
    noise: dict[int, int] = {}  # by position
    steps: tuple[Known, ...] = ()
    while len(text) < 3:
        draws: Text = ()
        for position in range(len(text), len(text) + K):
            if position not in noise:
                noise[position] = script.choose([Fraction(1, CELLS)] * CELLS)
            before = (text[-1], *draws)[-1]
            shares = [token for token in range(TOKENS) for _ in range(Q[before][token])]
            draws = (*draws, shares[noise[position]])
        steps = (*steps, confidences(text[-1], draws))
        count = admitted(steps, setting)
        if len(steps) == 2:
            tight[count] += 1
        text = (*text, *verified(script, text[-1], draws[:count]))
    return text[1:3]


def laws(confidences: Confidences, setting: Setting, tight: Counter[int]) -> dict[Text, Fraction]:
    """Exact probability of the first two tokens."""
    found: dict[Text, Fraction] = defaultdict(Fraction)
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        script = Script(waiting.pop())
        found[two_steps(script, confidences, setting, tight)] += script.probability
        waiting += script.branches
    assert sum(found.values()) == 1
    return found


def distance(found: dict[Text, Fraction]) -> Fraction:
    """Total variation from the target's own law."""
    pairs = [(a, b) for a in range(TOKENS) for b in range(TOKENS)]
    expected = {(a, b): P_OF[FIRST][a] * P_OF[a][b] for a, b in pairs}
    return sum((abs(found.get(t, Fraction(0)) - p) for t, p in expected.items()), Fraction(0)) / 2


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = adaptive_verification._assign_draft_token_budget
    monkeypatch.setattr(adaptive_verification, "_assign_draft_token_budget_compiled", rule)


def test_the_law_is_the_targets() -> None:
    tight = Counter[int]()
    for setting in (EVEN, CROWDED, SURE, SURE_CROWDED):
        assert distance(laws(as_shipped, setting, tight)) == 0
    print(f"second steps by drafts verified {dict(tight)}; ", end="")
    assert len(tight) >= 3, "the steps verify as many drafts"


@pytest.mark.parametrize(
    ("mutant", "setting"),
    [
        (of_the_drawn_token, EVEN),
        (along_what_is_drawn, CROWDED),
        (of_the_drawn_token, SURE),
        (along_what_is_drawn, SURE_CROWDED),
    ],
)
def test_a_confidence_that_knows_what_was_drawn_is_seen(
    mutant: Confidences, setting: Setting
) -> None:
    off = distance(laws(mutant, setting, Counter()))
    print(f"off by {float(off):.4f}; ", end="")
    assert off > WRONG


def test_confidences_are_those_of_the_best_drafts() -> None:
    """The same whatever was drawn, and as sure as the tokens before them are likely."""
    every = {tuple(as_shipped(1, (a, b, c))) for a in range(3) for b in range(3) for c in range(3)}
    assert len(every) == 1
    # After 1 the likeliest token is 2 (q 1/2), after 2 it is 2 again (3/4).
    (found,) = every
    assert found == pytest.approx([sigmoid_of(0.5), sigmoid_of(0.75), sigmoid_of(0.75)], rel=1e-5)


def sigmoid_of(largest: float) -> float:
    """What vLLM's estimator makes of a slot's largest probability."""
    return float(torch.sigmoid(SLOPE * torch.tensor(largest).logit() + INTERCEPT))
