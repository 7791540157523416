"""From measurements to metrics: medians over rounds, ratios within a round, the paper's terms."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_specformer.bench.arms import CONFIDENT, NONE, SCHEDULE
from vllm_specformer.bench.cells import Cell
from vllm_specformer.bench.compare import Result

Metrics = dict[str, Any]
COLUMNS = (
    *("arm", "concurrency", "rounds", "requests"),
    *("tokens_per_second", "tokens_per_second_min", "tokens_per_second_max"),
    *("ratio_to_none", "ratio_min", "ratio_max", "predicted_ratio"),
    *("tokens_per_step", "acceptance_length", "acceptance_per_position", "accepted_share"),
    *("drafted_per_step", "draft_ms", "tpot_ms", "ttft_ms"),
    *("p", "r1", "theta", "same_output", "load", "doubt"),
)
# What makes a line doubtful, and why.
THETA, LOAD = "theta", "load"
DOUBTS = {
    THETA: "below 1, though a step with drafts does all that one without does: the machine was "
    "busier while the other was measured",
    LOAD: "when a measurement began, more was running than the machine has cores",
}


def summarise(result: Result) -> list[Metrics]:
    """One line per concurrency and arm, in the order of the cells."""
    places: dict[tuple[int, str], list[Cell]] = {}
    for cell in result.cells:
        places.setdefault((cell.concurrency, cell.arm), []).append(cell)
    plain = {(cell.round, cell.concurrency): cell for cell in result.cells if cell.arm == NONE}
    return [_line(result, cells, plain) for cells in places.values()]


def _line(result: Result, cells: Sequence[Cell], plain: dict[tuple[int, int], Cell]) -> Metrics:
    first = cells[0]
    ratios, same = [], []
    for cell in cells:
        other = plain.get((cell.round, cell.concurrency))
        if other is not None:
            ratios.append(cell.tokens_per_second / other.tokens_per_second)
            same.append(_share(a == b for a, b in zip(cell.texts, other.texts, strict=True)))
    speeds = [cell.tokens_per_second for cell in cells]
    drafts, drafted, accepted = (
        sum(getattr(cell, name) for cell in cells) for name in ("drafts", "drafted", "accepted")
    )
    per_step = statistics.median(cell.tokens_per_step for cell in cells)
    ratio = statistics.median(ratios) if ratios else None
    theta = _rounded(per_step / ratio) if ratio else None
    load = max(cell.load for cell in cells)
    line: Metrics = {
        "arm": first.arm,
        "concurrency": first.concurrency,
        "rounds": len(cells),
        "requests": first.requests,
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_second_min": round(min(speeds), 1),
        "tokens_per_second_max": round(max(speeds), 1),
        "ratio_to_none": _rounded(ratio),
        "ratio_min": _rounded(min(ratios, default=None)),
        "ratio_max": _rounded(max(ratios, default=None)),
        "predicted_ratio": _rounded(_predicted(result, first, plain)),
        "tokens_per_step": round(per_step, 3),
        "acceptance_length": round(1 + accepted / drafts, 3) if drafts else 1.0,
        "acceptance_per_position": _per_position(cells, drafts),
        "accepted_share": round(accepted / drafted, 3) if drafted else None,
        "drafted_per_step": round(drafted / drafts, 3) if drafts else 0.0,
        "draft_ms": _draft_ms(cells),
        "tpot_ms": round(statistics.median(cell.tpot_ms for cell in cells), 2),
        "ttft_ms": round(statistics.median(cell.ttft_ms for cell in cells), 1),
        "theta": theta,
        "same_output": round(statistics.mean(same), 3) if same else None,
        "load": load,
        "doubt": [
            *([THETA] if theta is not None and theta < 1 and first.arm != NONE else []),
            *([LOAD] if load > result.about["hardware"]["cores"] else []),
        ],
    }
    return line | _paper_terms(result, first, per_step, drafted / drafts if drafts else 0.0)


def _paper_terms(result: Result, cell: Cell, per_step: float, count: float) -> Metrics:
    """Compute ratio p and gain in arithmetic intensity r1 of our own head (ALGORITHMS, 2)."""
    if (cell.speculative or {}).get("method") != "specformer":
        return {"p": None, "r1": None}
    head = result.head
    # A tree has more nodes than there are slots.
    own = head.shared_parameters + min(count, head.slots) * head.slot_parameters
    p = 1 + own / result.target.parameters
    return {"p": round(p, 4), "r1": round(per_step / p, 3)}


def _predicted(result: Result, cell: Cell, plain: dict[tuple[int, int], Cell]) -> float | None:
    """What the plan expects of this load, with answers as long as those without speculation."""
    plan, without = result.plan, plain.get((cell.round, cell.concurrency))
    if plan is None or without is None or cell.speculative is None:
        return None
    if cell.arm == SCHEDULE:
        return plan.expected_ratio(without.lengths, cell.concurrency, plan.count_at)
    if cell.arm == CONFIDENT or cell.speculative.get("method") != "specformer":
        return None  # a plan knows what is accepted of whole drafts
    if "tree_nodes" in cell.speculative:
        plan = plan.with_trees(cell.speculative)
        if plan is None:
            return None
        return plan.expected_ratio(without.lengths, cell.concurrency, plan.count_at)
    if cell.speculative.get("enable_adaptive_verification"):
        plan = plan.with_adaptive(cell.speculative)
        if plan is None:
            return None
        return plan.expected_ratio(without.lengths, cell.concurrency, plan.count_at)
    count = cell.speculative["num_speculative_tokens"]
    return plan.expected_ratio(without.lengths, cell.concurrency, lambda batch: count)


def prediction_error(lines: Iterable[Metrics]) -> float | None:
    """Mean of |predicted - measured| / measured over all lines that were predicted."""
    errors = [
        abs(line["predicted_ratio"] - line["ratio_to_none"]) / line["ratio_to_none"]
        for line in lines
        if line["predicted_ratio"] is not None and line["ratio_to_none"]
    ]
    return statistics.mean(errors) if errors else None


def _per_position(cells: Sequence[Cell], drafts: int) -> list[float]:
    """Share of all drafts that were accepted up to each position."""
    totals = [sum(counts) for counts in zip(*(cell.accepted_at for cell in cells), strict=True)]
    return [round(total / drafts, 3) for total in totals] if drafts else []


def _draft_ms(cells: Sequence[Cell]) -> float | None:
    """Mean of a draft step, where the server counts them."""
    seconds = [cell.draft_seconds for cell in cells if cell.draft_seconds is not None]
    steps = sum(cell.draft_steps or 0 for cell in cells)
    return round(1000 * sum(seconds) / steps, 3) if seconds and steps else None


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
