"""From the rows of the kernel benchmark to its tables and files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

COLUMNS = (
    *("op", "case", "dtype", "implementation", "microseconds", "low", "high", "how"),
    *("times_kernel", "least_bytes", "launches", "predicted_microseconds", "copy_share", "aim"),
    *("copy_bytes_per_second", "error", "tolerance", "note"),
)


def print_predictions(rows: Iterable[Row]) -> None:
    """What is expected, before anything is timed."""
    table = Table("op", "case", "MB", "launches", "predicted us", "aim", title="predictions")
    for row in rows:
        megabytes, launches = f"{row['least_bytes'] / 1e6:.2f}", str(row["launches"])
        predicted = (_number(row["predicted_us"]), _share(row["aim"]))
        table.add_row(row["op"], row["case"], megabytes, launches, *predicted)
    Console(width=120).print(table)


def print_results(rows: Sequence[Row]) -> None:
    table = Table("op", "case", "check", "predicted us", "measured us", "ratio", "of copy", "aim")
    table.add_column("instead, in times the kernel's time", ratio=1)
    last = None
    for row in rows:
        if last not in (None, row["op"]):
            table.add_section()
        last = row["op"]
        kernel = row.get("kernel", {})
        ratio = kernel["us"] / row["predicted_us"] if kernel and row["predicted_us"] else None
        table.add_row(
            row["op"],
            row["case"],
            f"[red]{row['failure']}" if row["failure"] else f"ok ({row['error']:.0e})",
            _number(row["predicted_us"]),
            _number(kernel.get("us")),
            _number(ratio, 2),
            _share(row.get("copy_share")),
            _aim(row),
            "\n".join(_other(name, other) for name, other in row.get("others", {}).items()),
        )
    Console(width=160).print(table)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _aim(row: Row) -> str:
    if row["aim"] is None or row.get("copy_share") is None:
        return _share(row["aim"])
    return f"{row['aim']:.0%} {'met' if row['copy_share'] >= row['aim'] else 'missed'}"


def _other(name: str, other: Row) -> str:
    if "us" not in other:
        return f"{name}: {other['note']}"
    note = f"; {other['note']}" if other.get("note") else ""
    return f"{name}: {other['times_kernel']:.2f} ({other['how']}{note})"


def write(stem: Path, report: Row) -> None:
    """Write `report` to STEM.json and STEM.csv; rows of ops it does not hold stay as they are."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_suffix(".json")
    done = {row["op"] for row in report["rows"]}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in kept if row["op"] not in done] + report["rows"]
    rows.sort(key=lambda row: row["op"])
    path.write_text(json.dumps(report | {"rows": rows}, indent=2) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for row in rows for line in _lines(row))


def _lines(row: Row) -> Iterable[Row]:
    """One line for the kernel and one for each implementation beside it."""
    common = {name: row[name] for name in ("op", "case", "dtype", "copy_bytes_per_second")}
    about = {name: row.get(name) for name in ("least_bytes", "launches", "copy_share", "aim")}
    about |= {"error": row.get("error"), "tolerance": row["tolerance"], "note": row["failure"]}
    about |= {"predicted_microseconds": row["predicted_us"], "implementation": "kernel"}
    yield common | _timing(row.get("kernel", {})) | about
    for name, other in row.get("others", {}).items():
        beside = {key: other.get(key) for key in ("times_kernel", "note")}
        yield common | _timing(other) | beside | {"implementation": name}


def _timing(value: Row) -> Row:
    names = {"microseconds": "us", "low": "low_us", "high": "high_us", "how": "how"}
    return {column: value.get(name) for column, name in names.items()}
