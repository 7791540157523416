"""A comparison's files: CSV, JSON, a table for a page, plots; and the table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_specformer.bench.arms import NONE
from vllm_specformer.bench.compare import Result
from vllm_specformer.bench.metrics import (
    COLUMNS,
    DOUBTS,
    Metrics,
    prediction_error,
    summarise,
)
from vllm_specformer.data.files import write_atomic

_WIDTH = 142
_NAMES = (
    *("at once", "arm", "tokens/s", "over none", "min-max", "tokens/step", "accepted", "drafted"),
    *("draft ms", "ms/token", "theta", "same", "predicted", "doubt"),
)
_LEGEND = (
    "Tokens/s over all requests; over none: of the same round, median and range; tokens/step: of "
    "one request, drafts that were not made included; accepted: share of the drafted tokens; "
    "drafted: per draft; theta: tokens/step over the gain; same: share of answers equal to those "
    "without speculation; predicted: by the plan."
)


def report(result: Result, out: Path) -> None:
    """Print the table and write `bench.csv`, `cells.csv`, `bench.json`, `bench.md`, `bench.png`."""
    lines = summarise(result)
    error = prediction_error(lines)
    about = result.about | {"prediction_error": None if error is None else round(error, 4)}
    Console(width=_WIDTH, highlight=False).print(_table(lines, about))
    write_atomic(out / "bench.csv", _csv(COLUMNS, lines))
    names = ("round", "concurrency", "arm", "requests", "seconds", "output_tokens")
    more = ("tpot_ms", "ttft_ms", "drafts", "drafted", "accepted", "load")
    cells = [{name: getattr(cell, name) for name in (*names, *more)} for cell in result.cells]
    write_atomic(out / "cells.csv", _csv((*names, *more), cells))
    content = json.dumps({"about": about, "lines": lines}, indent=2) + "\n"
    write_atomic(out / "bench.json", content.encode())
    write_atomic(out / "bench.md", _markdown(lines, about).encode())
    write_atomic(out / "bench.png", plot(lines, about))
    if error is not None:
        print(f"predicted and measured ratios differ by {error:.1%} on average")
    print(f"wrote {out}/bench.csv, cells.csv, bench.json, bench.md and bench.png")


def _csv(names: Sequence[str], lines: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        joined = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in line.items()}
        writer.writerow(joined)
    return text.getvalue().encode()


def _cells(line: Metrics) -> list[str]:
    compared = line["arm"] != NONE and line["ratio_to_none"] is not None
    spread = f"{line['ratio_min']:.2f}-{line['ratio_max']:.2f}" if compared else ""
    return [
        str(line["concurrency"]),
        line["arm"],
        f"{line['tokens_per_second']:.1f}",
        f"{line['ratio_to_none']:.2f}" if compared else "",
        spread,
        f"{line['tokens_per_step']:.2f}",
        _text(line["accepted_share"], "{:.0%}"),
        f"{line['drafted_per_step']:.2f}",
        _text(line["draft_ms"], "{:.2f}"),
        f"{line['tpot_ms']:.1f}",
        _text(line["theta"], "{:.2f}") if compared else "",
        _text(line["same_output"], "{:.0%}") if compared else "",
        _text(line["predicted_ratio"], "{:.2f}"),
        " ".join(line["doubt"]),
    ]


def _doubts(lines: Sequence[Metrics]) -> str:
    """What the marks mean, if there are any."""
    marks = [mark for mark in DOUBTS if any(mark in line["doubt"] for line in lines)]
    if not marks:
        return ""
    said = "; ".join(f"{mark}: {DOUBTS[mark]}" for mark in marks)
    return f"Lines with a mark under doubt should be measured again. {said[0].upper()}{said[1:]}."


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(lines: Sequence[Metrics], about: dict[str, Any]) -> Table:
    table = Table(
        title=_title(about),
        caption="\n".join(filter(None, (_caption(about), _LEGEND, _doubts(lines)))),
        title_justify="left",
        caption_justify="left",
        padding=(0, 0, 0, 1),
    )
    for name in _NAMES:
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    last = None
    for line in lines:
        if last not in (None, line["concurrency"]):
            table.add_section()
        last = line["concurrency"]
        table.add_row(*_cells(line))
    return table


def _title(about: dict[str, Any]) -> str:
    return f"{about['target']}, {about['target_parameters'] / 1e6:.0f}M parameters"


def _caption(about: dict[str, Any]) -> str:
    return (
        f"medians of {about['rounds']} rounds, ratios within a round; {about['order']}; "
        f"{about['hardware'].get('gpu', about['hardware']['cpu'])}"
    )


def _markdown(lines: Sequence[Metrics], about: dict[str, Any]) -> str:
    rows = [f"| {' | '.join(_NAMES)} |", f"|{'---|' * len(_NAMES)}"]
    rows += [f"| {' | '.join(_cells(line))} |" for line in lines]
    known = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    error = about["prediction_error"]
    predicted = (
        f"\nPredicted and measured ratios differ by {error:.1%} on average.\n" if error else ""
    )
    return (
        f"Target: {_title(about)}. {_caption(about)}; {known}.\n\n"
        f"```bash\n{about['command']}\n```\n\n" + "\n".join(rows) + f"\n\n{_LEGEND}\n"
        f"{_doubts(lines)}\n" + predicted
    )


def plot(lines: Sequence[Metrics], about: dict[str, Any]) -> bytes:
    """Ratio and tokens per step over concurrency, time per token over throughput; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    ratio, steps, trade = figure.subplots(1, 3)
    concurrencies = sorted({line["concurrency"] for line in lines})
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = sorted(
            (line for line in lines if line["arm"] == arm), key=lambda line: line["concurrency"]
        )
        x = [line["concurrency"] for line in own]
        style = {"marker": "o", "label": arm, "color": "grey" if arm == NONE else None}
        if arm != NONE and all(line["ratio_to_none"] for line in own):
            y = [line["ratio_to_none"] for line in own]
            low = [line["ratio_to_none"] - line["ratio_min"] for line in own]
            high = [line["ratio_max"] - line["ratio_to_none"] for line in own]
            ratio.errorbar(x, y, yerr=(low, high), capsize=3, **style)
        steps.plot(x, [line["tokens_per_step"] for line in own], **style)
        speed = [line["tokens_per_second"] for line in own]
        trade.plot(speed, [line["tpot_ms"] for line in own], **style)
    ratio.axhline(1, color="grey", linewidth=1, linestyle="--")
    for axes in (ratio, steps):
        axes.set_xscale("log", base=2)
        axes.set_xticks(concurrencies, list(map(str, concurrencies)))
        axes.set_xlabel("requests at a time")
    ratio.set_ylabel("tokens/s over no speculation")
    steps.set_ylabel("tokens per step")
    trade.set(xlabel="tokens/s, all requests", ylabel="ms per output token", yscale="log")
    for axes in (ratio, steps, trade):
        axes.grid(alpha=0.3)
    steps.legend(fontsize=8)
    figure.suptitle(_title(about), fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
