"""How many candidates a tree should have at each batch size, beside the best chain.

A tree of n nodes makes the target verify n + 1 rows of every request, as a chain of n drafts would,
and brings more tokens for them. So rows of a plan are about trees when their `count` are nodes, and
what chooses among chains chooses among trees. Where few rows are nearly free, the best tree is one
of as many nodes as a chain has drafts, and costs and brings about what that chain does.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_specformer.planning.acceptance import from_evaluation, trees_of_evaluation
from vllm_specformer.planning.choose import (
    PlanRow,
    best_count,
    rows_from_json,
    rows_to_json,
    schedule,
)

# From tokens per step by nodes to the rows of trees.
Costs = Callable[[dict[int, float]], list[PlanRow]]


@dataclass(frozen=True)
class Trees:
    """Chains and trees at one temperature: costs and gains by drafts, and by nodes."""

    temperature: float
    chains: list[PlanRow]
    rows: list[PlanRow]

    def best(self, batch: int, margin: float) -> tuple[PlanRow, PlanRow]:
        """The chain and the tree that are chosen at one of the batch sizes."""

        def chosen(rows: Sequence[PlanRow]) -> PlanRow:
            own = {row.count: row for row in rows if row.batch == batch}
            return own[best_count(list(own.values()), margin)]

        return chosen(self.chains), chosen(self.rows)

    def pays_at(self, batch: int, margin: float) -> bool:
        """Whether the best tree gains `margin` more than the best chain."""
        chain, tree = self.best(batch, margin)
        return tree.ratio > chain.ratio * (1 + margin) and tree.ratio > 1

    def pays(self, margin: float) -> bool:
        """Whether it does at any batch size."""
        return any(self.pays_at(batch, margin) for batch in {row.batch for row in self.rows})

    def config(self, head: str, margin: float) -> dict[str, Any]:
        """The dictionary for `--speculative-config`; all slots of the head are the depth."""
        ranges = schedule(self.rows, margin)
        return {
            "method": "specformer",
            "model": head,
            "tree_nodes": max(1, *(nodes for _, _, nodes in ranges)),
            "tree_nodes_per_batch_size": ranges,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "chains": rows_to_json(self.chains),
            "rows": rows_to_json(self.rows),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Trees:
        chains, rows = (rows_from_json(content[name]) for name in ("chains", "rows"))
        return cls(content["temperature"], chains, rows)


def trees_of(
    evaluation: Path, temperature: float, rows: Sequence[PlanRow], costs: Costs
) -> list[Trees]:
    """Trees at every temperature of an evaluation that has any, `temperature` first.

    A tree of as many nodes as a chain has drafts is taken to bring what the chain does, unless it
    was evaluated (for the bundled pair 2.46 for 2.45 and 3.29 for 3.21 at temperature 0 with 2 and
    4; 1.89 for 1.94 and 2.23 for 2.17 at temperature 1).

    Args:
        rows: of chains, whose costs hold at every temperature.
        costs: makes rows of trees out of tokens per step by nodes, 0 among them.
    """
    found = []
    for heat, by_nodes in trees_of_evaluation(evaluation).items():
        gains = from_evaluation(evaluation, sorted({row.count for row in rows}), heat)
        chains = [replace(row, tokens_per_step=gains[row.count]) for row in rows]
        found.append(Trees(heat, chains, costs(gains | by_nodes)))
    return sorted(found, key=lambda trees: (trees.temperature != temperature, trees.temperature))


def costs_by_rows(rows: Sequence[PlanRow], tokens_per_step: Mapping[int, float]) -> list[PlanRow]:
    """Rows of trees out of measured chains: what a step costs by the rows that it verifies.

    A batch of 2 with 31 nodes verifies 64 rows, as one of 16 with 3 drafts does. Between measured
    numbers of rows costs are straight lines; beyond the last they grow as from the last but one, at
    least in proportion. More requests read more context for as many rows, so few requests are not
    flattered. Drafting costs what the chain over as many slots does; what a tree adds to that was
    not measured.
    """
    verified: dict[int, list[float]] = {}
    for row in rows:
        verified.setdefault(row.batch * (row.count + 1), []).append(row.step - row.draft)
    curve = sorted((total, statistics.mean(seconds)) for total, seconds in verified.items())
    found = []
    for batch in sorted({row.batch for row in rows}):
        own = {row.count: row for row in rows if row.batch == batch}
        for nodes, gain in sorted(tokens_per_step.items()):
            if nodes in own:
                found.append(replace(own[nodes], tokens_per_step=gain))
                continue
            drafting = own[min((c for c in own if c >= nodes), default=max(own))]
            step = _seconds(curve, batch * (nodes + 1)) + drafting.draft
            found.append(replace(drafting, count=nodes, tokens_per_step=gain, step=step))
    return found


def _seconds(curve: Sequence[tuple[int, float]], total: int) -> float:
    place = bisect_left([rows for rows, _ in curve], total)
    if place == len(curve):
        rows, seconds = curve[-1]
        slopes = [(seconds - s) / (rows - r) for r, s in curve[-2:-1]]
        return seconds + (total - rows) * max(seconds / rows, *slopes)
    (low, fast), (high, slow) = curve[max(0, place - 1)], curve[place]
    return slow if high == low else fast + (slow - fast) * (total - low) / (high - low)
