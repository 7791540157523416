"""An evaluation for people: tables on the terminal, and a plot."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_specformer.evaluation.agreement import TOLERANCE
from vllm_specformer.evaluation.metrics import (
    ALL,
    CHAIN,
    HALF,
    NODES,
    Metrics,
    better_lookup,
    served_method,
)
from vllm_specformer.evaluation.replay import BOUND, DRAWN, HEAD, LOOKUP_2_3, LOOKUP_3, LOOKUPS

_TITLES = {
    HEAD: "head",
    DRAWN: "drawn drafts",
    LOOKUP_3: "lookup 3",
    LOOKUP_2_3: "lookup 2-3",
    BOUND: "bound",
}
_WIDTH = 110


def print_report(report: Metrics) -> None:
    """Everything the JSON has, but for what only machines read."""
    console = Console(width=_WIDTH, highlight=False)
    for name, metrics in report["offline"].items():
        console.print(_offline_table(name, metrics))
        last = list(metrics[ALL][served_method(metrics[ALL])].values())[-1]
        shares = " ".join(f"{share:.2f}" for share in last["acceptance_per_position"])
        console.print(f"accepted per position: {shares}\n")
        if "by_kind" in metrics:
            console.print(_kinds_table(name, metrics))
        if "trees" in metrics:
            console.print(_tree_table(name, metrics["trees"]))
    if report["calibration"]:
        console.print(_calibration_table(report["calibration"]))
    if report["engine"]:
        console.print(_engine_table(report["engine"]))
    for comparison in report["engine"]:
        if comparison["causes"]:
            console.print(f"\n{_disagreement(comparison)}", markup=False)
        for cause in comparison["causes"]:
            console.print(f"- {cause}", markup=False)


def _offline_table(name: str, metrics: Metrics) -> Table:
    methods = list(metrics[ALL])
    caption = "lookup: n-grams of the text itself; half: the texts that repeat themselves least"
    if DRAWN in methods:
        caption += "; drawn drafts are what sampled requests get, head the greedy ones"
    table = Table(
        title=f"{name.replace('_', ' ')}: tokens per step, {metrics['texts']} texts of "
        f"{metrics['mean_answer_tokens']} tokens on average, {metrics['repeated_4grams']:.0%} "
        "repeated 4-grams",
        caption=caption,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("K", justify="right")
    for method in methods:
        table.add_column(_TITLES[method], justify="right")
    table.add_column("head / lookup", justify="right")
    if BOUND in methods:
        table.add_column("of bound", justify="right")
    served = served_method(methods)
    for method in (served, *LOOKUPS):
        table.add_column(f"half: {_TITLES[method]}", justify="right")
    for k in metrics[ALL][HEAD]:
        cells = [f"{metrics[ALL][method][k]['tokens_per_step']:.2f}" for method in methods]
        cells.append(f"{metrics['over_lookup'][k]:.2f}")
        if BOUND in methods:
            cells.append(f"{metrics['share_of_bound'][k]:.0%}")
        cells += [f"{metrics[HALF][m][k]['tokens_per_step']:.2f}" for m in (served, *LOOKUPS)]
        table.add_row(k.removeprefix("K="), *cells)
    return table


def _kinds_table(name: str, metrics: Metrics) -> Table:
    """Head and the better lookup on each kind of prompt, at K=4 and at the largest K."""
    budgets = list(metrics[ALL][HEAD])
    shown = [k for k in dict.fromkeys(("K=4", budgets[-1])) if k in budgets]
    table = Table(
        title=f"{name.replace('_', ' ')}, by kind: tokens per step, and of the better lookup",
        title_justify="left",
    )
    table.add_column("kind")
    table.add_column("texts", justify="right")
    for k in shown:
        for title in (k, "lookup", f"half: {k}", "lookup"):
            table.add_column(title, justify="right")
    for kind, group in metrics["by_kind"].items():
        cells = []
        for k in shown:
            for part in (group[ALL], group[HALF]):
                cells.append(f"{part[served_method(part)][k]['tokens_per_step']:.2f}")
                cells.append(f"{better_lookup(part, k):.2f}")
        table.add_row(kind, str(group["texts"]), *cells)
    means = [metrics["mean_over_kinds"][k] for k in shown]
    cells = [c for m in means for c in (f"{m['head']:.2f}", f"{m['better_lookup']:.2f}", "", "")]
    table.add_row("mean of kinds", str(metrics["texts"]), *cells)
    return table


def _tree_table(name: str, rows: Metrics) -> Table:
    """Trees beside the longest chain."""
    table = Table(
        title=f"{name.replace('_', ' ')}: tokens per step of trees, standard error over texts",
        title_justify="left",
    )
    for column in ("drafted nodes", "tokens per step", "", "over the chain"):
        table.add_column(column, justify="right")
    (chain,) = [row["tokens_per_step"] for name, row in rows.items() if name.startswith(CHAIN)]
    for name, row in rows.items():
        table.add_row(
            name.removeprefix(NODES),
            f"{row['tokens_per_step']:.2f}",
            f"± {row['stderr']:.2f}",
            f"{row['tokens_per_step'] / chain:.2f}",
        )
    return table


def _calibration_table(kinds: Metrics) -> Table:
    """How far chances of acceptance are off, on the half of the texts that was not fitted to."""
    table = Table(
        title="chances of acceptance: expected calibration error and log loss, on unseen texts",
        title_justify="left",
    )
    for column in ("requests", "texts", "probability itself", "", "fitted", ""):
        table.add_column(column, justify="right")
    for kind, found in kinds.items():
        pairs = (found["probability"], found["fitted_to_the_other_half"])
        cells = (f"{pair[name]:.3f}" for pair in pairs for name in ("ece", "log_loss"))
        table.add_row(kind, str(found["texts"]), *cells)
    return table


def _engine_table(comparisons: list[Metrics]) -> Table:
    runner, vllm = comparisons[0]["runner"], comparisons[0]["vllm"]
    table = Table(
        title=f"the engine (vLLM {vllm}, {runner} runner) and the replay of its answers",
        title_justify="left",
    )
    for name in ("T", "K", "answers", "steps", "offline", "engine", "difference", "same steps", ""):
        table.add_column(name, justify="right")
    for row in comparisons:
        table.add_row(
            f"{row['temperature']:g}",
            str(row["num_speculative_tokens"]),
            str(row["answers"]),
            f"{row['engine']['steps']:,}",
            f"{row['offline']['tokens_per_step']:.3f}",
            f"{row['engine']['tokens_per_step']:.3f}",
            f"{row['difference']:+.2%}",
            f"{row['same_steps']:.2%}",
            "agrees" if row["agrees"] else "DISAGREES",
        )
    return table


def _disagreement(comparison: Metrics) -> str:
    return (
        f"At temperature {comparison['temperature']:g} and K="
        f"{comparison['num_speculative_tokens']} the engine's tokens per step differ by "
        f"{comparison['difference']:+.1%} from the replay's (allowed: {TOLERANCE:.0%}), and "
        f"{1 - comparison['same_steps']:.1%} of its steps differ:"
    )


def plot(report: Metrics) -> bytes:
    """Tokens per step over K, and acceptance per position, for each temperature; PNG."""
    from matplotlib.figure import Figure

    groups = report["offline"]
    figure = Figure(figsize=(10, 3.6 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), (name, metrics) in zip(grid, groups.items(), strict=True):
        for method, by_count in metrics[ALL].items():
            counts = [int(k.removeprefix("K=")) for k in by_count]
            values = [row["tokens_per_step"] for row in by_count.values()]
            left.plot(counts, values, marker="o", label=_TITLES[method])
            shares = list(by_count.values())[-1]["acceptance_per_position"]
            right.plot(range(1, len(shares) + 1), shares, marker="o", label=_TITLES[method])
        for label, counts, values, shares in _served(report, metrics["temperature"]):
            left.plot(counts, values, "kx", label=label)
            right.plot(range(1, len(shares) + 1), shares, "kx", label=label)
        title = name.replace("_", " ")
        left.set(xlabel="drafted tokens K", ylabel="tokens per step", title=title)
        right.set(xlabel="position", ylabel="share of drafts accepted", title=title, ylim=(0, 1))
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def _served(
    report: Metrics, temperature: float
) -> Iterator[tuple[str, list[int], list[float], list[Any]]]:
    """The engine's points of one temperature, if it ran."""
    rows = [row for row in report["engine"] if round(row["temperature"], 4) == temperature]
    if rows:
        counts = [row["num_speculative_tokens"] for row in rows]
        values = [row["engine"]["tokens_per_step"] for row in rows]
        yield "engine", counts, values, rows[-1]["engine"]["acceptance_per_position"]
