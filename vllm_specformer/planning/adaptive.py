"""What adaptive verification should bring: the drafts of each batch size that pay, and no others.

vLLM verifies the likeliest of a batch's drafts, as many as bring the most tokens per second. All K
slots are drafted; a step then costs what the verified rows cost. An evaluation tells what share of
the accepted drafts the likeliest have (`evaluation/likeliest.py`), a plan's rows what rows cost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vllm_specformer.planning.choose import PlanRow

# Share of accepted drafts among the likeliest 0 to 1 of all drafts, in equal parts; by K.
Kept = Mapping[int, Sequence[float]]


def adaptive_rows(rows: Sequence[PlanRow], kept: Kept) -> list[PlanRow]:
    """The rows of chains with the best number of drafts verified, those of K = 0 as they are.

    Between the numbers of drafts that there are rows of, what the target takes is a straight line.
    The engine chooses anew in every step, here each batch size has one choice. A number of drafts
    that `kept` does not know is left out.
    """
    found = []
    for batch in sorted({row.batch for row in rows}):
        own = sorted((row for row in rows if row.batch == batch), key=lambda row: row.count)
        target = [(row.count, row.step - row.draft) for row in own]
        for row in own:
            if row.count == 0:
                found.append(row)
            elif row.count in kept:
                found.append(_best(row, target, kept[row.count]))
    return found


def _best(row: PlanRow, target: Sequence[tuple[int, float]], kept: Sequence[float]) -> PlanRow:
    """One batch size and K: where tokens per second are most.

    Both curves are straight between their points, so the best is at a point of one of them.
    """
    parts = len(kept) - 1
    curve = [(row.count * part / parts, share) for part, share in enumerate(kept)]
    places = {place for place, _ in curve} | {
        float(count) for count, _ in target if count <= row.count
    }
    choices = [
        replace(
            row,
            tokens_per_step=1 + _at(curve, place) * (row.tokens_per_step - 1),
            step=_at(target, place) + row.draft,
        )
        for place in sorted(places)
    ]
    return max(choices, key=lambda choice: choice.ratio)


def _at(curve: Sequence[tuple[float, float]], place: float) -> float:
    """A curve's value between its points."""
    index = bisect_left([x for x, _ in curve], place)
    (low, a), (high, b) = curve[max(0, index - 1)], curve[min(index, len(curve) - 1)]
    return b if high == low else a + (b - a) * (place - low) / (high - low)
