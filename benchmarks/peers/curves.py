"""Tokens per step by cpu-seconds and by K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peers.figures import Row, mean_speed, of
from peers.plan import BUDGETS, DRAFTED, KINDS, TITLES
from vllm_specformer.evaluation.metrics import ALL, HALF


def best_rate(rows: Sequence[Row]) -> Sequence[Row]:
    """Those of the rate with the most tokens per step at K=4."""
    by_rate = [of(rows, rate=rate) for rate in {row["rate"] for row in rows}]
    return max(by_rate, key=lambda own: mean_speed(own, ALL, 4), default=[])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Greedy, of all held-out prompts and of the less repetitive half; of a head the best rate."""
    from matplotlib.figure import Figure

    longest = max(row["budget"] for row in rows)
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_budget, by_k, half = figure.subplots(1, 3)
    for kind in KINDS:
        own = of(rows, kind=kind)
        budgets = sorted({row["budget"] for row in own})
        mean = [mean_speed(best_rate(of(own, budget=b)), ALL, 4) for b in budgets]
        by_budget.plot(budgets, mean, marker="o", label=TITLES[kind])
        last = best_rate(of(own, budget=longest))
        for axes, group in ((by_k, ALL), (half, HALF)):
            if last:
                values = [mean_speed(last, group, k) for k in DRAFTED]
                axes.plot(DRAFTED, values, marker="o", label=TITLES[kind])
    by_budget.set(title="K=4", xlabel="cpu-seconds of training", ylabel="tokens per step, greedy")
    by_budget.set_xscale("log")
    by_budget.set_xticks(BUDGETS, [f"{b:,}" for b in BUDGETS])
    by_budget.legend()
    by_k.set(title=f"{longest:,} cpu-seconds", xlabel="K", xticks=DRAFTED)
    half.set(title="the same, less repetitive half", xlabel="K", xticks=DRAFTED)
    for axes in (by_budget, by_k, half):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
