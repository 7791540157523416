"""The table at the end of a run: what every stage found, measured beside predicted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from gpu_stages import predict
from gpu_stages.arms import ARMS, BASELINE, PUBLISHED, TREES, Arm, find
from gpu_stages.plan import HALF
from gpu_stages.shapes import TARGETS
from gpu_stages.store import Store

Result = dict[str, Any]
OURS, RIVALS = "specformer-k4", ("eagle3-k4", "dflash-k4", "dspark-k4", "peagle-k4")
MAX_OVERHEAD = 0.08


def print_report(store: Store, dry: bool) -> None:
    """Everything there is; in a dry run without times, which would mean nothing."""
    console = Console(width=126)
    for stage in "abcde":
        for name, unit in store.read(stage).items():
            if unit.get("failure"):
                reason = unit["failure"].splitlines()[0]
                console.print(f"{stage}, {name}: FAILED: {reason}", markup=False)
    for line in (*_started(store), *_kernels(store, dry), *_pair(store), *_acceptance(store)):
        console.print(line, markup=False)
    rows = throughput_rows(store)
    if rows:
        store.summarise(rows)
        for _, own in itertools.groupby(rows, key=lambda row: row["shape"]):
            console.print(_throughput_table(list(own), dry))
        for line in (*_sources(rows), *([] if dry else aims(rows))):
            console.print(line, markup=False)
    for line in _profile(store, dry):
        console.print(line, markup=False)
    if dry:
        console.print("dry run: toy sizes on a CPU; what was checked is real, no time is")


def _started(store: Store) -> Iterator[str]:
    for unit in store.finished("a").values():
        doctor = "ok" if unit["doctor"]["ok"] else unit["doctor"]["problems"]
        yield f"a  {unit['device']['name']}; {unit['versions']['vllm']}; doctor {doctor}"


def _kernels(store: Store, dry: bool) -> Iterator[str]:
    for name, unit in store.finished("b").items():
        timed = f", see {name}.csv for times" if name == "kernels" and not dry else ""
        yield f"b  {len(unit['rows'])} kernel cases right{timed}"


def same(one: Result, other: Result, job: str, other_job: str = "") -> str:
    """How many answers of a job are the same tokens in both engines."""
    pairs = list(zip(one["answers"][job], other["answers"][other_job or job], strict=True))
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def _pair(store: Store) -> Iterator[str]:
    units = store.finished("c")
    for mode in ("eager", "graphs", f"eager {HALF}", f"graphs {HALF}"):
        none = units.get(f"none, {mode}")
        if none is None:
            continue
        yield f"c  {mode}: batching alone: {same(none, none, 'greedy', 'greedy in groups')} same"
        for arm in ("specformer", "coupled", "tree"):
            unit = units.get(f"{arm}, {mode}")
            if unit is None:
                continue
            drafts, accepted = unit["counters"]["drafts"], unit["counters"]["accepted_tokens"]
            line = f"c  {mode}: {arm}: greedy {same(unit, none, 'greedy')} same"
            if arm != "specformer":
                line += f", seeded {same(unit, none, 'seeded')} same"
            yield f"{line}, {1 + accepted / max(1, drafts):.2f} tokens per step"
            if dense := unit["dense"]:
                wrong = f"{len(dense['wrong'])} are not the dense head's, {dense['ties']} ties"
                graphs = f"graphs of {unit['draft_graphs'] or 'no'} requests"
                yield f"c  {mode}: {graphs}; of {dense['compared']} drafts {wrong}"


def _acceptance(store: Store) -> Iterator[str]:
    unit = store.finished("c").get("acceptance")
    for row in unit["engine"] if unit else ():
        yield (
            f"c  acceptance at temperature {row['temperature']:g}: "
            f"{row['engine']['tokens_per_step']:.3f} tokens per step on {row['runner']}, "
            f"{row['offline']['tokens_per_step']:.3f} by replay on the CPU: "
            f"{row['difference']:+.1%}, {'ok' if row['agrees'] else 'DIFFERS'}"
        )


def throughput_rows(store: Store) -> list[Result]:
    """Every measured row of stage d with its ratio, its θ and what was predicted."""
    units, rows = store.finished("d"), []
    for name, unit in units.items():
        shape, arm = name.split()[0], find(name.split()[1])
        baseline = units.get(f"{shape} {arm.baseline}")
        plain = {row["batch"]: row for row in baseline["rows"]} if baseline else {}
        for row in unit["rows"]:
            rows.append(_row(shape, arm, row, plain.get(row["batch"]), unit))
    order = [arm.name for arm in (*ARMS, *PUBLISHED, *TREES)]
    return sorted(rows, key=lambda r: (r["shape"], order.index(r["arm"]), r["batch"]))


def _row(shape: str, arm: Arm, row: Result, plain: Result | None, unit: Result) -> Result:
    found = {"shape": shape, "arm": arm.name, "weights_gib": unit["weights_gib"], **row}
    if plain:
        found["ratio"] = row["tokens_per_second"] / plain["tokens_per_second"]
        found["theta"] = row["tokens_per_step"] / found["ratio"]
    if shape in TARGETS:
        found["predicted"] = predict.row(shape, arm, row["batch"])
    return found


def _sources(rows: list[Result]) -> Iterator[str]:
    """Whose acceptance lengths the arms have that do not share the equal one."""
    for name in dict.fromkeys(row["arm"] for row in rows):
        if find(name).source:
            yield f"   {name}: its published length, {find(name).length:g} ({find(name).source})"


def aims(rows: list[Result]) -> Iterator[str]:
    """Whether the aims set for the 8B target are met, for every batch that was measured."""
    found = {(row["arm"], row["batch"]): row for row in rows if row["shape"] == "8b"}
    for batch in sorted({batch for _, batch in found}):
        ours = found.get((OURS, batch), {})
        if batch <= 128 and "theta" in ours:
            met = "met" if ours["theta"] - 1 <= MAX_OVERHEAD else "missed"
            yield f"d  batch {batch}: {met}: θ - 1 is {ours['theta'] - 1:.0%}, to be at most 8%"
        others = {arm: found[arm, batch]["draft_ms"] for arm in RIVALS if (arm, batch) in found}
        if batch >= 16 and ours and others:
            best = min(others, key=others.__getitem__)
            met = "met" if ours["draft_ms"] <= others[best] else "missed"
            yield (
                f"d  batch {batch}: {met}: draft of {ours['draft_ms']:.2f} ms against "
                f"{others[best]:.2f} of {best}, the cheapest other one"
            )


def _throughput_table(rows: list[Result], dry: bool) -> Table:
    """One target: a line for each arm, and below it what was predicted."""
    cells = {(row["arm"], row["batch"]): row for row in rows}
    batches = sorted({row["batch"] for row in rows})
    shown = "tokens per step" if dry else "draft ms, θ, ratio"
    table = Table(f"{rows[0]['shape']}: {shown}", *(f"batch {batch}" for batch in batches))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [cells.get((arm, batch), {}) for batch in batches]
        if dry:
            table.add_row(arm, *(f"{row['tokens_per_step']:.2f}" for row in own))
        elif not arm.startswith(BASELINE):
            table.add_row(arm, *(_figures(row) for row in own))
            table.add_row("  predicted", *(_figures(row.get("predicted", {})) for row in own))
        else:
            table.add_row(f"{arm}: step ms", *(_step(row, "step_ms") for row in own))
            predicted = (row.get("predicted", {}) for row in own)
            table.add_row("  predicted", *(_step(row, "plain_ms") for row in predicted))
    return table


def _figures(row: Result) -> str:
    values = (row.get(name) for name in ("draft_ms", "theta", "ratio"))
    return " ".join("-" if value is None else f"{value:.2f}" for value in values) if row else ""


def _step(row: Result, name: str) -> str:
    return f"{row[name]:.2f}" if name in row else ""


def _profile(store: Store, dry: bool) -> Iterator[str]:
    for unit in store.finished("e").values():
        for row in unit["rows"]:
            if dry:
                yield f"e  batch {row['batch']}: {row['drafts']} draft steps found in the trace"
                continue
            launches, calls = f"{row['launches']:.0f} kernels", f"{row['host_launches']:.0f} calls"
            yield (
                f"e  batch {row['batch']}: {launches} from {calls}, {row['span']:.0f} us of which "
                f"{row['gaps']:.0f} us gaps, {row['share']:.0%} of the step, "
                f"{row['bytes_per_second'] / 1e12:.2f} TB/s of the least bytes"
            )
