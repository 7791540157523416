"""Looking up results: a row per head that was trained and replayed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def speed(row: Row, temperature: str, group: str, k: int) -> float:
    """Tokens per step of a head."""
    return float(row["replay"][temperature][group][f"K={k}"]["tokens_per_step"])


def mean_speed(rows: Sequence[Row], group: str, k: int) -> float:
    """Greedy tokens per step of heads of several seeds."""
    return statistics.mean(speed(row, "0", group, k) for row in rows)
