"""From costs and acceptance to the number of drafted tokens that pays at each batch size.

Expected throughput against no speculation, at batch size B with K drafted tokens:

    ratio(B, K) = a(K) * T_plain(B) / T_step(B, K)

where a(K) is the mean number of tokens a step emits, T_plain the step of a server without
speculation, and T_step the whole step with it: verifying K + 1 rows and drafting. K = 0 costs what
storing the head's K/V and the engine's own provisions for drafts cost, so its ratio is below 1.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Gains below this are within the noise of measuring, and not worth the risk of being a loss.
MARGIN = 0.02


@dataclass(frozen=True)
class PlanRow:
    """One batch size and number of drafted tokens; times are of one step, in seconds.

    Attributes:
        plain, step: a step that only decodes, without speculation and with it.
        plain_prompt, prompt: one request's share of a step that reads as many prompts as the batch
            has requests; 0 where nobody measured it.
    """

    batch: int
    count: int
    tokens_per_step: float
    plain: float
    step: float
    draft: float
    plain_prompt: float = 0.0
    prompt: float = 0.0

    @property
    def ratio(self) -> float:
        """Tokens per second over those without speculation."""
        return self.tokens_per_step * self.plain / self.step


def rows_to_json(rows: Sequence[PlanRow]) -> list[dict[str, Any]]:
    """Rows as a plan's file has them, with the ratio for readers."""
    return [asdict(row) | {"ratio": round(row.ratio, 4)} for row in rows]


def rows_from_json(rows: Sequence[Mapping[str, Any]]) -> list[PlanRow]:
    return [PlanRow(**{k: v for k, v in row.items() if k != "ratio"}) for row in rows]


def best_count(rows: Sequence[PlanRow], margin: float = MARGIN) -> int:
    """The K of one batch size that gains most, 0 unless it gains `margin` more than 0 does.

    What K = 0 costs is part of the choice: where it is much, drafting at a small loss is better.
    """
    best = max(rows, key=lambda row: row.ratio)
    without = next((row.ratio for row in rows if row.count == 0), 1.0)
    return best.count if best.ratio > without * (1 + margin) else 0


def between(rows: Sequence[PlanRow], batch: int) -> list[PlanRow]:
    """The rows of a batch size, by straight lines between those that are there."""
    found = []
    for count in sorted({row.count for row in rows}):
        known = sorted((row for row in rows if row.count == count), key=lambda row: row.batch)
        found.append(_interpolated(known, batch))
    return found


def _interpolated(known: Sequence[PlanRow], batch: int) -> PlanRow:
    place = bisect_left([row.batch for row in known], batch)
    if place == len(known):
        return _at(known[-1], known[-1], batch)
    return _at(known[max(0, place - 1)], known[place], batch)


def _at(low: PlanRow, high: PlanRow, batch: int) -> PlanRow:
    width = high.batch - low.batch
    share = min(1.0, max(0.0, (batch - low.batch) / width)) if width else 0.0

    def mix(a: float, b: float) -> float:
        return a + share * (b - a)

    return PlanRow(
        batch,
        low.count,
        mix(low.tokens_per_step, high.tokens_per_step),
        mix(low.plain, high.plain),
        mix(low.step, high.step),
        mix(low.draft, high.draft),
        mix(low.plain_prompt, high.plain_prompt),
        mix(low.prompt, high.prompt),
    )


def schedule(rows: Sequence[PlanRow], margin: float = MARGIN) -> list[list[int]]:
    """The best K for every batch size up to the largest, as vLLM takes it.

    Returns:
        [[first batch size, last, K], ...], inclusive and without gaps.
    """
    return _ranges(rows, lambda batch: best_count(batch, margin))


def break_even(rows: Sequence[PlanRow]) -> float:
    """Chance of acceptance from which on a draft is worth verifying, at one batch size.

    A row takes its share of a step, and in that time the batch would have emitted tokens: it pays
    if it brings more of them. What drafting itself takes is spent whether a draft is kept or not.
    """
    # Both are per request: a row of one of them, and what one of them gains in a second.
    tokens_per_second = max(row.tokens_per_step / row.step for row in rows)
    return min(1.0, max(0.0, _seconds_per_row(rows) * tokens_per_second))


def _seconds_per_row(rows: Sequence[PlanRow]) -> float:
    """What one more row of every request adds to a step of one batch size."""
    counts = [row.count for row in rows]
    if len(set(counts)) < 2:
        return 0.0
    return statistics.linear_regression(counts, [row.step - row.draft for row in rows]).slope


def best_count_with_cut(rows: Sequence[PlanRow], margin: float = MARGIN) -> int:
    """The K of one batch size where drafts are cut by confidence, 0 where it cannot pay.

    As if the cut were perfect: of K slots that are drafted, only what is accepted is verified. So
    it weighs the slots' own cost against what they bring, and leaves the rows to the cut.
    """
    per_row = max(0.0, _seconds_per_row(rows))
    bare = min(rows, key=lambda row: row.count)

    def tokens_per_second(row: PlanRow) -> float:
        verified = bare.step - bare.draft + (row.tokens_per_step - 1) * per_row
        return row.tokens_per_step / (verified + row.draft)

    best = max(rows, key=tokens_per_second)
    return best.count if tokens_per_second(best) > tokens_per_second(bare) * (1 + margin) else 0


def cut_schedule(rows: Sequence[PlanRow], margin: float = MARGIN) -> list[list[int]]:
    """`best_count_with_cut` of every batch size up to the largest, as vLLM takes it."""
    return _ranges(rows, lambda batch: best_count_with_cut(batch, margin))


def thresholds(rows: Sequence[PlanRow]) -> list[list[float]]:
    """`break_even` of every batch size up to the largest, in steps of 0.05.

    Returns:
        [[first batch size, last, threshold], ...], inclusive and without gaps.
    """
    return _ranges(rows, lambda batch: round(20 * break_even(batch)) / 20)


def _ranges(rows: Sequence[PlanRow], value: Callable[[list[PlanRow]], float]) -> list[list[Any]]:
    """[[first batch size, last, value], ...] up to the largest, inclusive and without gaps."""
    ranges: list[list[Any]] = []
    for batch in range(1, max(row.batch for row in rows) + 1):
        found = value(between(rows, batch))
        if ranges and ranges[-1][2] == found:
            ranges[-1][1] = batch
        else:
            ranges.append([batch, batch, found])
    return ranges


def combine(
    plain: Mapping[int, float],
    steps: Mapping[tuple[int, int], float],
    drafts: Mapping[tuple[int, int], float],
    tokens_per_step: Mapping[int, float],
    prompts: Mapping[int, tuple[float, float]] | None = None,
) -> list[PlanRow]:
    """Rows out of costs by batch size, or by batch size and count, and acceptance by count.

    Args:
        prompts: seconds per prompt, without speculation and with it, by batch size.
    """
    found = []
    for (batch, count), seconds in sorted(steps.items()):
        costs = (plain[batch], seconds, drafts[batch, count])
        reading = (prompts or {}).get(batch, (0.0, 0.0))
        found.append(PlanRow(batch, count, tokens_per_step[count], *costs, *reading))
    return found
