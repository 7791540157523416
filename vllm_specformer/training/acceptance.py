"""Exact acceptance of drafts on a known continuation, without running speculation.

Under lossless verification the emitted text does not depend on the drafts, so a step can be
replayed on it: from position `t` the accepted drafts are the longest prefix that equals the text,
and the step emits them plus one token. This is exact for greedy text, and for sampled text under
coupled verification, whose acceptance law is that of rejection sampling for deterministic drafts.
Drafts that are drawn are accepted by chance, given the text: of them the expectation is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Drafts for the tokens that follow text[: position + 2], i.e. after the bonus token.
Drafter = Callable[[int], Sequence[int]]
# Their chances of being accepted, one after another.
Chances = Callable[[int], Sequence[float]]


@dataclass
class Acceptance:
    """Counts over many texts; those that are expected of drawn drafts are no whole numbers."""

    num_slots: int
    steps: float = 0
    tokens: float = 0
    accepted: list[float] = field(default_factory=list)
    offered: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted = [0] * self.num_slots
        self.offered = [0] * self.num_slots

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens emitted per target forward, bonus token included."""
        return self.tokens / max(1, self.steps)

    @property
    def per_position(self) -> list[float]:
        """Share of steps whose draft reached and passed slot `i` (vLLM's per-position rate)."""
        return [a / max(1, o) for a, o in zip(self.accepted, self.offered, strict=True)]

    def walk(self, text: Sequence[int], start: int, drafter: Drafter) -> list[int]:
        """Replay one text whose first generated token is `text[start]`.

        Returns:
            The drafts accepted in each step.
        """
        position = start - 1  # last token the target has seen; text[start] is the first bonus token
        steps = []
        while position + 1 < len(text):
            room = len(text) - (position + 2)
            drafts = drafter(position)[: min(self.num_slots, max(room, 0))]
            matched = 0
            for slot, draft in enumerate(drafts):
                self.offered[slot] += 1
                if matched == slot and draft == text[position + 2 + slot]:
                    self.accepted[slot] += 1
                    matched += 1
            self.steps += 1
            self.tokens += matched + 1
            position += matched + 1
            steps.append(matched)
        return steps

    def expect(self, length: int, start: int, chances: Chances) -> None:
        """Add what is expected of drafts that are accepted by chance, over all that may happen.

        Args:
            length: tokens of the text, whose first generated token is `text[start]`.
            chances: the probability of each draft at a position, given that all before it were
                accepted.
        """
        reached = [0.0] * (length + 1)  # probability that a step begins behind this position
        reached[start - 1] = 1.0
        for position in range(start - 1, length - 1):
            here = running = reached[position]
            room = length - (position + 2)
            offered = chances(position)[: min(self.num_slots, room)]
            for slot, chance in enumerate(offered):
                accepted = running * chance
                self.offered[slot] += here
                self.accepted[slot] += accepted
                self.tokens += accepted
                reached[position + slot + 1] += running - accepted
                running = accepted
            reached[position + len(offered) + 1] += running
            self.steps += here
            self.tokens += here


class Lookup:
    """Prompt lookup: continue the earliest match of the last n tokens; the longest n wins.

    This is what vLLM's `ngram` method proposes. A text's n-grams are entered once, as the earliest
    match of an n-gram is its first occurrence wherever the text is cut.
    """

    def __init__(self, text: Sequence[int], longest: int, shortest: int) -> None:
        self.text = list(text)
        self.first: dict[int, dict[tuple[int, ...], int]] = {}
        for size in range(longest, shortest - 1, -1):
            begins = range(len(self.text) - size, -1, -1)
            self.first[size] = {tuple(self.text[i : i + size]): i for i in begins}

    def drafts(self, end: int, count: int) -> list[int]:
        """At most `count` tokens to follow `text[:end]`, of which alone it knows."""
        for size, first in self.first.items():
            if end <= size:
                continue
            begin = first[tuple(self.text[end - size : end])]
            if begin < end - size:
                return self.text[begin + size : min(begin + size + count, end)]
        return []


def repeated_fraction(tokens: Sequence[int], size: int = 4) -> float:
    """Share of n-grams of a text that occurred in it before; 0 for shorter texts."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
