"""What a server, or an engine in this process, has counted about its drafts."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "vllm:spec_decode_num_"
DRAFT_SECONDS, DRAFT_STEPS = "specformer:draft_seconds_total", "specformer:draft_steps_total"


@dataclass(frozen=True)
class DraftCounts:
    """What a server has counted about its drafts since it started."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()
    # Time in the proposer and its calls, where the method counts them.
    draft_seconds: float | None = None
    draft_steps: int | None = None

    def __sub__(self, earlier: DraftCounts) -> DraftCounts:
        before = earlier.accepted_at or (0,) * len(self.accepted_at)
        return DraftCounts(
            self.drafts - earlier.drafts,
            self.drafted - earlier.drafted,
            self.accepted - earlier.accepted,
            tuple(now - then for now, then in zip(self.accepted_at, before, strict=True)),
            _minus(self.draft_seconds, earlier.draft_seconds),
            _minus(self.draft_steps, earlier.draft_steps),
        )

    @property
    def tokens_per_step(self) -> float:
        """Tokens one request gains per step: the accepted drafts and the target's own token."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the drafts whose first n tokens were accepted, for n = 1..K."""
        return [count / self.drafts if self.drafts else 0.0 for count in self.accepted_at]


def _minus(now: Any, then: Any) -> Any:
    """The increase, None where nothing is counted."""
    return None if now is None else now - (then or 0)


def parse_draft_counts(metrics: str) -> DraftCounts:
    """Read the speculative decoding counters out of a /metrics page; zeros where there are none."""
    totals: dict[str, int] = {}
    positions: dict[int, int] = {}
    times: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in (DRAFT_SECONDS, DRAFT_STEPS):  # one of each per engine
                times[sample.name] = times.get(sample.name, 0.0) + sample.value
            # The Prometheus client adds a `_created` time stamp to every counter.
            if not sample.name.startswith(PREFIX) or not sample.name.endswith("_total"):
                continue
            name = sample.name.removeprefix(PREFIX).removesuffix("_total")
            if "position" in sample.labels:
                position = int(sample.labels["position"])
                positions[position] = positions.get(position, 0) + int(sample.value)
            else:
                totals[name] = totals.get(name, 0) + int(sample.value)
    return DraftCounts(
        totals.get("drafts", 0),
        totals.get("draft_tokens", 0),
        totals.get("accepted_tokens", 0),
        tuple(positions[position] for position in sorted(positions)),
        times.get(DRAFT_SECONDS),
        int(times[DRAFT_STEPS]) if DRAFT_STEPS in times else None,
    )


def own_draft_counts() -> DraftCounts:
    """Those of the engines in this process."""
    return parse_draft_counts(generate_latest(REGISTRY).decode())


def read_draft_counts(url: str) -> DraftCounts:
    """Those of the server at `url`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return parse_draft_counts(answer.read().decode())
