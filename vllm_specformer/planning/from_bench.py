"""Rows of a plan out of what `specformer bench` measured: whole loads through real servers.

A plan that times steps sees the engine alone. A server's front and its clients work beside the
engine, and where they share its cores (a CPU, above all) steps full of arithmetic suffer more from
that than steps that wait for memory. What was measured under load has it all in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.planning.choose import PlanRow

_NONE = "none"
_SCHEDULE = "num_speculative_tokens_per_batch_size"


def rows_from_bench(path: Path) -> tuple[list[PlanRow], dict[str, Any]]:
    """The arms with one K at every batch size, as rows; and what the file says of itself.

    `plain` and `step` are the seconds from one token (or step) of a request to the next, reading
    prompts included, so that `PlanRow.ratio` is the ratio measured. Where no arm drafted nothing,
    K = 0 counts as no speculation.

    Raises:
        SpecFormerError: not such a file, no such arms, or not all of them at every concurrency.
    """
    about, lines = _read(path)
    counts = {
        arm: count
        for arm, config in about["arms"].items()
        if (count := _fixed_count(config)) is not None
    }
    measured = {(line["concurrency"], line["arm"]): line for line in lines}
    sizes = sorted({concurrency for concurrency, _ in measured})
    if not any(counts.values()):
        raise SpecFormerError(
            f"--bench {path}: has no arm with one number of SpecFormer drafts",
            "run `specformer bench` with --num-speculative-tokens, or with arms such as k2 and k4",
        )
    rows = []
    for size in sizes:
        absent = [arm for arm in (_NONE, *counts) if (size, arm) not in measured]
        if absent:
            raise SpecFormerError(
                f"--bench {path}: {', '.join(absent)} not measured at concurrency {size}",
                "let `specformer bench` finish",
            )
        plain = size / measured[size, _NONE]["tokens_per_second"]
        if 0 not in counts.values():
            rows.append(PlanRow(size, 0, 1.0, plain, plain, 0.0))
        for arm, count in counts.items():
            line = measured[size, arm]
            gain = line["tokens_per_step"]
            step = gain * plain / line["ratio_to_none"]
            rows.append(PlanRow(size, count, gain, plain, step, (line["draft_ms"] or 0.0) / 1000))
    return sorted(rows, key=lambda row: (row.batch, row.count)), about


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
        about, lines = content["about"], content["lines"]
        return about | {"arms": dict(about["arms"])}, lines
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SpecFormerError(
            f"--bench {path}: expected the bench.json that `specformer bench` writes "
            f"({type(error).__name__}: {error})"
        ) from None


def _fixed_count(config: dict[str, Any] | None) -> int | None:
    """The K that an arm drafts at every batch size; None if it has none, or no chain of them."""
    if not config or config.get("method") != "specformer":
        return None
    if "draft_confidence_threshold" in config or "tree_nodes" in config:
        return None
    counts = {count for _, _, count in config.get(_SCHEDULE) or []}
    if len(counts) > 1:
        return None
    return int(counts.pop() if counts else config["num_speculative_tokens"])
