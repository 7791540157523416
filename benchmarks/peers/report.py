"""From results to the tables of docs/peers.md, the curves, and one flat table of all figures."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peers import curves
from peers.figures import Row, of, speed
from peers.plan import BUDGETS, DRAFTED, KINDS, ROOT, TARGET, TITLES, heads
from peers.served import LOADS, NONE
from vllm_specformer.data.files import write_atomic
from vllm_specformer.evaluation.metrics import ALL, HALF

HEADS, SERVED, PLOT, FLAT = "heads.json", "served.json", "tokens-per-step.png", "peers.csv"
DOCUMENT = ROOT / "docs" / "peers.md"
BEGIN, END = "<!-- made by `make peers`: begin -->", "<!-- end -->"


def read(results: Path) -> list[Row]:
    """A row per head that was trained and replayed."""
    path = results / HEADS
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def write(results: Path, document: Path) -> None:
    """Curves beside the results, tables into the document."""
    rows, lines = read(results), []
    if rows:
        curves.draw(rows, results / PLOT)
        write_atomic(results / FLAT, flat(rows).encode())
        place = os.path.relpath(results / PLOT, document.parent)
        lines = [f"![tokens per step by cpu-seconds and K]({place})", ""]
    text = "\n".join([*tables(rows), *lines, *served_table(results / SERVED)])
    before, _, rest = document.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    write_atomic(document, f"{before}{BEGIN}\n\n{text}\n{END}{after}".encode())


def flat(rows: Sequence[Row]) -> str:
    """A line per head, temperature and K, as CSV.

    `rate` is times the library's own, `half` is of the texts that repeat themselves least.
    """
    names = ("head", "target", "cpu_seconds", "seed", "rate", "temperature", "k")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*names, "tokens_per_step", "stderr", "half", "parameters"])
    for row in rows:
        about = (row["kind"], TARGET.name, row["budget"], row["seed"], row["rate"])
        for temperature, groups in row["replay"].items():
            for k in DRAFTED:
                found = groups[ALL][f"K={k}"]
                figures = (
                    found["tokens_per_step"],
                    found["stderr"],
                    speed(row, temperature, HALF, k),
                )
                parameters = row["training"]["parameters"]
                writer.writerow([*about, temperature, k, *figures, parameters])
    return table.getvalue()


def cell(found: Sequence[Row], value: Callable[[Row], float], digits: int = 2) -> str:
    """Mean over the seeds; with several, half the distance of the extremes."""
    values = [value(row) for row in found]
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    spread = (max(values) - min(values)) / 2
    return f"{mean} ± {spread:.{digits}f}" if digits and len(values) > 1 else mean


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)] + [""]


def tables(rows: Sequence[Row]) -> list[str]:
    """Greedy and sampled, for each budget, and what has not been run."""
    text: list[str] = []
    for budget in sorted({row["budget"] for row in rows}):
        own = of(rows, budget=budget)
        arms = sorted({(KINDS.index(row["kind"]), row["rate"]) for row in own})
        found = [of(own, kind=KINDS[kind], rate=rate) for kind, rate in arms]
        text += [f"### {budget:,} cpu-seconds", ""]
        names = [f"K={k}" for k in DRAFTED]
        title = ["greedy", "seeds", "parameters", "texts", *names, *[f"{n}, half" for n in names]]
        text += table(title, [greedy_line(rows_of_arm) for rows_of_arm in found])
        title = ["sampled, greedy drafts", *[f"T={t}, {n}" for t in ("0.7", "1") for n in names]]
        text += table(title, [sampled_line(rows_of_arm) for rows_of_arm in found])
    known = {(row["kind"], row["budget"], row["seed"]) for row in rows}
    wanted = heads(BUDGETS, None, KINDS)
    missing = [head for head in wanted if (head.kind, head.budget, head.seed) not in known]
    if missing:
        text += [f"Not run: {not_run(missing)}.", ""]
    return text


def title_of(row: Row) -> str:
    """A head, and how its rates differ from the library's."""
    title = TITLES[row["kind"]]
    return title if row["rate"] == 1 else f"{title}, {row['rate']:g} times the rates"


def greedy_line(found: Sequence[Row]) -> list[str]:
    return [
        title_of(found[0]),
        str(len(found)),
        f"{found[0]['training']['parameters']:,}",
        cell(found, lambda row: row["training"]["texts"], 0),
        *[
            cell(found, lambda row, group=group, k=k: speed(row, "0", group, k))
            for group in (ALL, HALF)
            for k in DRAFTED
        ],
    ]


def sampled_line(found: Sequence[Row]) -> list[str]:
    return [
        title_of(found[0]),
        *[
            cell(found, lambda row, t=t, k=k: speed(row, t, ALL, k))
            for t in ("0.7", "1")
            for k in DRAFTED
        ],
    ]


def not_run(missing: Sequence[Any]) -> str:
    """Trainings that are left, those of all kinds together in short."""
    parts = []
    for budget, seed in sorted({(head.budget, head.seed) for head in missing}):
        kinds = [h.kind for h in missing if (h.budget, h.seed) == (budget, seed)]
        whose = "all heads" if len(kinds) == len(KINDS) else ", ".join(TITLES[k] for k in kinds)
        parts.append(f"{whose} at {budget:,} cpu-seconds with seed {seed}")
    return "; ".join(parts)


def served_table(path: Path) -> list[str]:
    """Tokens per step and the gain over no speculation, on the clock and in cpu-seconds."""
    if not path.is_file():
        return ["Not run: serving.", ""]
    content = json.loads(path.read_text())
    rows = [row for row in content["rows"] if "failure" not in row]
    kinds = [kind for kind in KINDS if of(rows, kind=kind)]
    text = [
        f"### Served, K={content['K']}, heads of {content['budget']:,} cpu-seconds",
        "",
        "Gain over no speculation: medians over the rounds, in brackets the extremes.",
        "",
    ]
    body = [
        served_line(rows, kind, load) for kind in kinds for load in LOADS
        if of(rows, kind=kind, requests=load)
    ]  # fmt: skip
    text += table(["head", "requests", "tokens per step", "by cpu-seconds", "by the clock"], body)
    for row in content["rows"]:
        if "failure" in row:
            text += [f"{TITLES.get(row['kind'], row['kind'])} did not start: {row['failure']}", ""]
    loads = [load for load in LOADS if not of(rows, requests=load)]
    if loads:
        text += [f"Not run: {', '.join(map(str, loads))} requests.", ""]
    return text


def served_line(rows: Sequence[Row], kind: str, load: int) -> list[str]:
    own = of(rows, kind=kind, requests=load)
    accepted = sum(row["num_accepted_tokens"] for row in own)
    drafts = sum(row["num_drafts"] for row in own)
    cells = []
    for clock in ("cpu_seconds", "seconds"):
        gains = []
        for row in own:
            (none,) = of(rows, kind=NONE, requests=load, round=row["round"])
            gains.append(row["tokens"] / row[clock] * none[clock] / none["tokens"])
        low, high = min(gains), max(gains)
        cells.append(f"{statistics.median(gains):.2f} ({low:.2f}-{high:.2f})")
    return [TITLES[kind], str(load), f"{1 + accepted / max(1, drafts):.2f}", *cells]
