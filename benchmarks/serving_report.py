"""From the rows of the serving benchmark to its table, files and plot."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from serving_arm import ARMS, BASELINE

Row = dict[str, Any]


def summarise(rows: Iterable[Row]) -> list[Row]:
    """One line per temperature, concurrency and arm."""
    groups: dict[tuple[float, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["temperature"], row["concurrency"], row["arm"]), []).append(row)
    return [
        _summary(key, group, groups[(key[0], key[1], BASELINE)])
        for key, group in sorted(groups.items(), key=lambda item: item[0][:2])
    ]


def _summary(key: tuple[float, int, str], rows: list[Row], baseline: list[Row]) -> Row:
    def speed(row: Row, seconds: str = "seconds") -> float:
        return float(row["tokens"] / row[seconds])

    def median(values: Iterable[float]) -> float:
        return statistics.median(list(values))

    pairs = list(zip(rows, baseline, strict=True))
    ratios = [speed(a) / speed(b) for a, b in pairs]
    drafts = sum(row.get("drafts", 0) for row in rows)
    accepted = [row["accepted_tokens_per_pos"] for row in rows] if drafts else []
    return {
        "temperature": key[0],
        "concurrency": key[1],
        "arm": key[2],
        "ms_per_step": round(median(1000 * r["seconds"] / r["steps"] for r in rows), 3),
        "cpu_ms_per_step": round(median(1000 * r["cpu_seconds"] / r["steps"] for r in rows), 3),
        "tokens_per_second": round(median(map(speed, rows)), 1),
        "ratio": round(median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        # The same ratio over processor time, which other processes on the machine disturb less.
        "ratio_cpu": round(
            median(speed(a, "cpu_seconds") / speed(b, "cpu_seconds") for a, b in pairs), 3
        ),
        "tokens_per_step": round(
            sum(r["decode_tokens"] for r in rows) / sum(r["decode_request_steps"] for r in rows), 3
        ),
        "acceptance_per_position": [round(sum(a) / drafts, 3) for a in zip(*accepted, strict=True)],
        "draft_share": round(median(r["draft_seconds"] / r["seconds"] for r in rows), 3),
    }


def print_table(summary: Iterable[Row]) -> None:
    columns = ("T", "at once", "arm", "ms/step", "tokens/s", "ratio (min-max)", "tokens/step")
    table = Table(*columns, "acceptance per position", "draft share")
    last = None
    for row in summary:
        if last not in (None, (row["temperature"], row["concurrency"])):
            table.add_section()
        last = (row["temperature"], row["concurrency"])
        table.add_row(
            f"{row['temperature']:.0f}",
            str(row["concurrency"]),
            row["arm"],
            f"{row['ms_per_step']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})",
            f"{row['tokens_per_step']:.2f}",
            " ".join(f"{a:.2f}" for a in row["acceptance_per_position"]),
            f"{row['draft_share']:.0%}",
        )
    Console(width=120).print(table)


def write(stem: Path, rows: list[Row], report: dict[str, Any]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    plot(stem.with_suffix(".png"), report["summary"])
    print(f"wrote {stem}.csv, .json and .png")


def plot(path: Path, summary: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    temperatures = sorted({row["temperature"] for row in summary})
    concurrencies = sorted({row["concurrency"] for row in summary})
    figure, grid = plt.subplots(1, len(temperatures), figsize=(9, 3.6), sharey=True, squeeze=False)
    axes = grid[0]
    for axis, temperature in zip(axes, temperatures, strict=True):
        for arm in ARMS:
            rows = [r for r in summary if (r["temperature"], r["arm"]) == (temperature, arm)]
            if arm == BASELINE or not rows:
                continue
            x, y = [r["concurrency"] for r in rows], [r["ratio"] for r in rows]
            low = [r["ratio"] - r["ratio_min"] for r in rows]
            high = [r["ratio_max"] - r["ratio"] for r in rows]
            axis.errorbar(x, y, yerr=(low, high), marker="o", capsize=3, label=arm)
        axis.axhline(1, color="grey", linewidth=1, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks(concurrencies, list(map(str, concurrencies)))
        axis.set_xlabel("concurrent requests")
        axis.set_title("greedy" if temperature == 0 else f"temperature {temperature:.0f}")
    axes[0].set_ylabel("tokens/s over no speculation")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
