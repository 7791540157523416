"""A plan: predicted rows, the schedule that follows, and what they rest on; as a JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_specformer.batch_ranges import closed, is_count, ranges_problem
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.planning.adaptive import Kept, adaptive_rows
from vllm_specformer.planning.choose import (
    MARGIN,
    PlanRow,
    between,
    cut_schedule,
    rows_from_json,
    rows_to_json,
    schedule,
    thresholds,
)
from vllm_specformer.planning.load import seconds_under_load
from vllm_specformer.planning.trees import Trees

KIND = "specformer plan"


@dataclass(frozen=True)
class Plan:
    """What to draft at which batch size; `rows` are empty for a schedule written by hand.

    `margin` is what drafting has to gain over K = 0, as a share; `trees` are trees beside chains,
    the first at the temperature that the plan is for; `adaptive` are chains of which only the
    likeliest drafts are verified.
    """

    schedule: list[list[int]]
    rows: list[PlanRow] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    margin: float = MARGIN
    trees: list[Trees] = field(default_factory=list)
    adaptive: list[PlanRow] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        rows: list[PlanRow],
        about: dict[str, Any],
        margin: float,
        trees: Sequence[Trees] = (),
        kept: Kept | None = None,
    ) -> Plan:
        """Args: as the fields; `kept` of the likeliest drafts, by number of drafts."""
        adaptive = adaptive_rows(rows, kept) if kept else []
        return cls(schedule(rows, margin), rows, about, margin, list(trees), adaptive)

    @property
    def pays(self) -> bool:
        """Whether speculation is expected to gain at any batch size."""
        if not self.rows:
            return any(count for _, _, count in self.schedule)
        return any(gain > 1 for gain in self.gains().values())

    def gains(self) -> dict[int, float]:
        """Expected tokens/s of the schedule over no speculation, by batch size."""
        batches = sorted({row.batch for row in self.rows})
        return {
            batch: gain
            for batch in batches
            if (gain := self.predicted(batch, self.count_at(batch))) is not None
        }

    def count_at(self, batch: int) -> int:
        """Drafted tokens at a batch size; the last range goes on."""
        for _, last, count in self.schedule:
            if batch <= last:
                return count
        return self.schedule[-1][2]

    def predicted(self, batch: int, count: int) -> float | None:
        """Expected tokens/s over no speculation, if such a count was looked at."""
        found = [row for row in between(self.rows, batch) if row.count == count]
        return found[0].ratio if found else None

    def expected_ratio(
        self, answers: Sequence[int], concurrency: int, count_at: Callable[[int], int]
    ) -> float | None:
        """Expected tokens/s over no speculation of a whole load (see load.py).

        Args:
            answers: tokens of each answer.
            count_at: drafted tokens by batch size.

        Returns:
            None where a batch size would draft a count that was not looked at.
        """
        if not {count_at(batch) for batch in range(1, concurrency + 1)} <= self.counts:
            return None
        without = seconds_under_load(self.rows, answers, concurrency, None)
        return without / seconds_under_load(self.rows, answers, concurrency, count_at)

    @property
    def counts(self) -> set[int]:
        """The numbers of drafted tokens that were looked at."""
        return {row.count for row in self.rows}

    def speculative_config(self, head: str) -> dict[str, Any]:
        """The dictionary for `--speculative-config`."""
        return {
            "method": "specformer",
            "model": head,
            **_counts(self.schedule),
        }

    def confident_config(self, head: str) -> dict[str, Any]:
        """The same for the V1 runner with drafts cut where the head is not sure (confidence.md)."""
        return {
            "method": "specformer",
            "model": head,
            **_counts(cut_schedule(self.rows, self.margin)),
            "draft_confidence_threshold": thresholds(self.rows),
        }

    def tree_config(self, head: str) -> dict[str, Any] | None:
        """The same for the V2 runner with trees; None where they are not known to pay."""
        if not self.trees or not self.trees[0].pays(self.margin):
            return None
        return self.trees[0].config(head, self.margin)

    def adaptive_config(self, head: str) -> dict[str, Any] | None:
        """The same for the V2 runner with adaptive verification; None where it is not known."""
        if not self.adaptive:
            return None
        ours = {"method": "specformer", "model": head, "enable_adaptive_verification": True}
        return ours | _counts(schedule(self.adaptive, self.margin))

    def with_adaptive(self, config: Mapping[str, Any]) -> Plan | None:
        """What a speculative config with adaptive verification should bring; None if not known."""
        if not self.adaptive:
            return None
        count = config["num_speculative_tokens"]
        ranges = config.get("num_speculative_tokens_per_batch_size") or [[1, 1, count]]
        return Plan(ranges, self.adaptive)

    @property
    def fixed_count(self) -> int:
        """The one K that is best for all batch sizes together, by the mean of its gains' logs."""

        def gain(count: int) -> float:
            ratios = [row.ratio for row in self.rows if row.count == count]
            return statistics.geometric_mean(ratios)

        return max(sorted(self.counts - {0}), key=gain)

    def mechanisms(self) -> dict[int, dict[str, float]]:
        """Expected tokens per second of each way to decide what is verified, by batch size.

        `none`, the best `fixed` K, the `schedule`, and where they are known `adaptive`
        verification and the best `tree`.
        """
        found = {}
        adaptive = schedule(self.adaptive, self.margin) if self.adaptive else []
        for batch in sorted({row.batch for row in self.rows}):
            own = {row.count: row for row in self.rows if row.batch == batch}
            chosen = {"fixed": own[self.fixed_count], "schedule": own[self.count_at(batch)]}
            if adaptive:
                count = Plan(adaptive).count_at(batch)
                chosen["adaptive"] = next(
                    row for row in self.adaptive if (row.batch, row.count) == (batch, count)
                )
            if self.trees:
                chosen["tree"] = self.trees[0].best(batch, self.margin)[1]
            plain = batch / own[self.fixed_count].plain
            found[batch] = {"none": plain} | {
                name: plain * row.ratio for name, row in chosen.items()
            }
        return found

    def with_trees(self, config: Mapping[str, Any]) -> Plan | None:
        """What a speculative config with trees should bring; None where no tree was looked at."""
        if not self.trees:
            return None
        ranges = config.get("tree_nodes_per_batch_size") or [[1, 1, config["tree_nodes"]]]
        return Plan(ranges, self.trees[0].rows)

    def to_json(self, head: str) -> dict[str, Any]:
        return {
            "kind": KIND,
            "schedule": self.schedule,
            "margin": self.margin,
            "speculative_config": self.speculative_config(head) if self.pays else None,
            "confident_config": self.confident_config(head) if self.pays else None,
            "tree_config": self.tree_config(head),
            "adaptive_config": self.adaptive_config(head),
            "tokens_per_second": self.mechanisms(),
            "rows": rows_to_json(self.rows),
            "trees": [trees.to_json() for trees in self.trees],
            "adaptive": rows_to_json(self.adaptive),
            "about": self.about,
        }


def _counts(ranges: list[list[int]]) -> dict[str, Any]:
    """The fields that make vLLM draft by batch size; it wants a K above 0 beside them."""
    return {
        "num_speculative_tokens": max(1, *(count for _, _, count in ranges)),
        "num_speculative_tokens_per_batch_size": ranges,
    }


def read_plan(path: Path) -> Plan:
    """A plan that `specformer plan --json` wrote, or a file with a schedule alone.

    Raises:
        SpecFormerError: the file is neither.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SpecFormerError(f"--schedule {path}: not readable as JSON ({error})") from None
    if isinstance(content, list):
        return Plan(checked_schedule(content, f"--schedule {path}"))
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise SpecFormerError(
            f"--schedule {path}: expected what `specformer plan --json` writes, or a schedule such "
            "as [[1, 8, 4], [9, 64, 0]]"
        )
    ranges = checked_schedule(content["schedule"], f"--schedule {path}")
    return Plan(
        ranges,
        rows_from_json(content["rows"]),
        content["about"],
        content.get("margin", MARGIN),
        [Trees.from_json(trees) for trees in content.get("trees", [])],
        rows_from_json(content.get("adaptive", [])),
    )


def checked_schedule(value: Any, source: str) -> list[list[int]]:
    """A schedule as vLLM takes it, [[first batch size, last, K], ...], in order and without gaps.

    Raises:
        SpecFormerError: anything else.
    """
    problem = ranges_problem(value, "tokens", is_count)
    if problem:
        raise SpecFormerError(
            f"{source}: {problem}", "expected a schedule such as [[1, 8, 4], [9, 64, 0]]"
        )
    return [list(entry) for entry in closed(value)]
