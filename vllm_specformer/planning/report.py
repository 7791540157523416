"""A plan for people: the table on the terminal, the plot, and the line to serve with."""

from __future__ import annotations

import io
import json
import shlex

from rich.console import Console
from rich.table import Table

from vllm_specformer.planning.choose import PlanRow
from vllm_specformer.planning.plan_file import Plan

_WIDTH = 110
_ENOUGH_CYCLES = 3  # the least whose median is not moved by one odd reading
_CELLS = "in brackets the time of a step that drafting takes (K=0: storing the head's K/V)"
_WHICH = (
    "Which of the two is faster depends on how well the head knows when it is wrong: `specformer "
    "bench --schedule` measures both. The second verifies only drafts that are likely enough; it "
    "needs --no-async-scheduling on the V1 runner, full CUDA graphs and no LoRA on V2."
)


def print_plan(plan: Plan, head: str) -> None:
    console = Console(width=_WIDTH, highlight=False)
    console.print(_table(plan))
    cycles = plan.about.get("cycles", _ENOUGH_CYCLES)
    if cycles < _ENOUGH_CYCLES:
        readings = "1 cycle, a single reading," if cycles == 1 else f"{cycles} cycles"
        console.print(f"Costs come from {readings} and may be noise; the default is --cycles 3.")
    if plan.pays:
        _print_chains(plan, head, console)
    else:
        what, it = ("Chains pay", "them") if plan.trees else ("Speculation pays", "it")
        console.print(f"{what} at none of these batch sizes: serve without {it}.")
    if plan.trees:
        _print_trees(plan, head, console)
    _print_mechanisms(plan, head, console)


def _print_mechanisms(plan: Plan, head: str, console: Console) -> None:
    """Every way to decide what is verified, side by side."""
    names = list(next(iter(plan.mechanisms().values())))
    table = Table(
        title="expected tokens/s, and over no speculation",
        title_justify="left",
    )
    titles = {"fixed": f"K={plan.fixed_count}"}
    for name in ("requests", *(titles.get(name, name) for name in names)):
        table.add_column(name, justify="right")
    for batch, rates in plan.mechanisms().items():
        best = max(rates.values())
        cells = []
        for rate in rates.values():
            text = f"{rate:,.0f} ({rate / rates['none']:.2f})"
            cells.append(f"[bold]{text}[/]" if rate == best else text)
        table.add_row(str(batch), *cells)
    console.print(table)
    adaptive = plan.adaptive_config(head)
    if adaptive is not None:
        console.print("Serve with adaptive verification, on the V2 runner", style="bold")
        config = json.dumps(adaptive)
        console.print(f"--speculative-config {shlex.quote(config)}", markup=False, soft_wrap=True)


def _print_chains(plan: Plan, head: str, console: Console) -> None:
    losses = {batch: 1 - gain for batch, gain in plan.gains().items() if gain < 1}
    if losses:
        shares = ", ".join(
            f"{max(loss, 0.001):{'.1%' if loss < 0.01 else '.0%'}} at {batch} requests"
            for batch, loss in losses.items()
        )
        console.print(
            f"Even the best K loses {shares}: a server without a speculative config is faster "
            "there."
        )
    config = json.dumps(plan.speculative_config(head))
    console.print("\nServe with", style="bold")
    console.print(f"--speculative-config {shlex.quote(config)}", markup=False, soft_wrap=True)
    console.print("or with drafts cut where the head is not sure", style="bold")
    config = json.dumps(plan.confident_config(head))
    console.print(f"--speculative-config {shlex.quote(config)}", markup=False, soft_wrap=True)
    console.print(_WHICH)


def _print_trees(plan: Plan, head: str, console: Console) -> None:
    console.print(_trees_table(plan))
    tree = plan.tree_config(head)
    if tree is None:
        console.print("Trees gain no more than chains at any of these batch sizes.")
        return
    console.print("Serve with trees, on the V2 runner", style="bold")
    config = json.dumps(tree)
    console.print(f"--speculative-config {shlex.quote(config)}", markup=False, soft_wrap=True)


def _trees_table(plan: Plan) -> Table:
    table = Table(
        title="expected tokens/s over no speculation, the best chain and the best tree of n nodes",
        title_justify="left",
    )
    table.add_column("requests", justify="right")
    for trees in plan.trees:
        for name in ("chain", "tree"):
            table.add_column(f"{name}, temperature {trees.temperature:g}", justify="right")
    for batch in sorted({row.batch for row in plan.rows}):
        cells = []
        for trees in plan.trees:
            chain, tree = trees.best(batch, plan.margin)
            pays = trees.pays_at(batch, plan.margin)
            named = ((f"K={chain.count}", chain, not pays), (f"n={tree.count}", tree, pays))
            for name, row, is_better in named:
                text = f"{name}: {row.ratio:.2f}"
                cells.append(f"[bold]{text}[/]" if is_better else text)
        table.add_row(str(batch), *cells)
    return table


def _table(plan: Plan) -> Table:
    counts = sorted({row.count for row in plan.rows})
    table = Table(
        title="expected tokens/s over no speculation, by drafted tokens K",
        caption="; ".join(filter(None, [_CELLS, str(plan.about.get("costs", ""))])),
        title_justify="left",
        caption_justify="left",
    )
    for name in ("requests", "step without, ms", *(f"K={count}" for count in counts), "best K"):
        table.add_column(name, justify="right")
    for batch in sorted({row.batch for row in plan.rows}):
        rows = {row.count: row for row in plan.rows if row.batch == batch}
        best = plan.count_at(batch)
        cells = [_cell(rows[count], count == best) for count in counts]
        table.add_row(str(batch), f"{1000 * rows[counts[0]].plain:.3g}", *cells, str(best))
    accepted = {row.count: row.tokens_per_step for row in plan.rows}
    table.add_section()
    table.add_row("tokens/step", "", *(f"{accepted[count]:.2f}" for count in counts), "")
    return table


def _cell(row: PlanRow, best: bool) -> str:
    text = f"{row.ratio:.2f} ({1000 * row.draft:.2g} ms)"
    return f"[bold]{text}[/]" if best else text


def plot(plan: Plan) -> bytes:
    """Expected ratio over the batch size, one line for every K and one for the schedule; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    batches = sorted({row.batch for row in plan.rows})
    for count in sorted({row.count for row in plan.rows}):
        rows = sorted((row for row in plan.rows if row.count == count), key=lambda row: row.batch)
        axes.plot(batches, [row.ratio for row in rows], marker="o", label=f"K={count}")
    gains = plan.gains()
    axes.plot(list(gains), list(gains.values()), "k--", linewidth=2, label="schedule")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, list(map(str, batches)))
    axes.set(xlabel="requests in a step", ylabel="expected tokens/s over no speculation")
    axes.set_title(str(plan.about.get("target", "")), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
