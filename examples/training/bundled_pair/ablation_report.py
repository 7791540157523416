"""Table and plot of `ablation.py`: one line per arm, over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
BASE, DEFAULTS = "base", "defaults"
# Column of the table -> field of a row, digits.
COLUMNS = {
    "seeds": ("seed", 0),
    "parameters": ("parameters", 0),
    "draft ms": ("draft_ms", 1),
    "K=2": ("tokens_per_step_k2", 2),
    "K=4": ("tokens_per_step_k4", 2),
    "K=8": ("tokens_per_step_k8", 2),
    "K=4, less repetitive half": ("less_repetitive_half_k4", 2),
    "K=4, temperature 1": ("temperature_1_k4", 2),
    "share of the bound": ("share_of_bound_k4", 2),
}


def by_arm(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def cell(heads: Rows, field: str, digits: int) -> str:
    """Mean over the seeds, for figures of two digits with half the distance of the extremes."""
    if field == "seed":
        return str(len(heads))
    values = [head[field] for head in heads if head[field] is not None]
    if not values:
        return ""
    spread = (max(values) - min(values)) / 2
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {spread:.{digits}f}" if digits == 2 and len(values) > 1 else mean


def write_table(rows: Rows, path: Path) -> None:
    lines = ["| arm | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm, heads in by_arm(rows).items():
        cells = [cell(heads, field, digits) for field, digits in COLUMNS.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lookup = rows[0]
    lines += [
        "",
        f"3-gram lookup on the same texts, K=4: {lookup['lookup_3_k4']:.2f}; on the less "
        f"repetitive half: {lookup['lookup_3_less_repetitive_half_k4']:.2f}.",
    ]
    path.write_text("\n".join(lines) + "\n")


def write_plot(rows: Rows, path: Path) -> None:
    """Tokens per step at K=4 of every head, arm by arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = by_arm(rows)
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(arms) + 1.2), layout="constrained")
    for place, (arm, heads) in enumerate(arms.items()):
        values = [head["tokens_per_step_k4"] for head in heads]
        colour = "tab:orange" if arm in (BASE, DEFAULTS) else "tab:blue"
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot(statistics.mean(values), place, "|", color=colour, markersize=16)
    for name in {BASE, DEFAULTS} & arms.keys():
        middle = statistics.mean(head["tokens_per_step_k4"] for head in arms[name])
        axes.axvline(middle, color="tab:orange", linewidth=0.8)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    axes.set_xlabel("tokens per step, K=4, greedy (dots: seeds, bar: mean)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
