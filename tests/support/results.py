"""Values of results files, by path.

A path goes through objects by `/` (a name with one in quotes), into lists by `[number]` or by what
an element has: `[arm=k4,concurrency=1]`. Rows of a CSV file are such a list. `mean [arm=k4]/ratio`,
and likewise `max` and `min`, are of all rows with that arm.
"""

from __future__ import annotations

import csv
import json
import re
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

STEP = re.compile(r'"([^"]*)"|([^/\[\]]+)|\[([^\]]*)\]')
OPERATION = re.compile(r" (over|times|minus|plus) ")


class FigureError(Exception):
    """A reference leads nowhere, or what it is about is not there."""


@cache
def results(path: Path) -> Any:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [
                {key: number(value) for key, value in row.items()} for row in csv.DictReader(file)
            ]
    return json.loads(path.read_text())


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def lookup(content: Any, path: str) -> Any:
    """What lies at `a/b[0]/c[x=1,y=two]`; a number stands for itself.

    `mean [x=1]/c`, and likewise `max` and `min`, are of all rows that have x=1.
    """
    if of_rows := re.fullmatch(r"(mean|max|min) \[(.*)\]/(.*)", path):
        values = [row[of_rows[3]] for row in selected(content, of_rows[2])]
        if not values:
            raise FigureError(f"{path}: no such row")
        return {"mean": mean, "max": max, "min": min}[of_rows[1]](values)
    if re.fullmatch(r"[\d.]+", path):
        return float(path)
    for quoted, plain, selection in STEP.findall(path):
        name = quoted or plain.strip()
        try:
            content = content[name] if name else chosen(content, selection)
        except (KeyError, IndexError, TypeError):
            raise FigureError(f"{path}: no {name or selection}") from None
    return content


def chosen(rows: Any, selection: str) -> Any:
    if selection.isdecimal():
        return rows[int(selection)]
    found = selected(rows, selection)
    if len(found) != 1:
        raise FigureError(f"[{selection}] is said of {len(found)} rows")
    return found[0]


def selected(rows: Any, selection: str) -> list[Any]:
    wanted = dict(part.split("=", 1) for part in re.split(r",(?=\w+=)", selection))
    return [row for row in rows if all(same(row.get(key), text) for key, text in wanted.items())]


def same(value: Any, text: str) -> bool:
    if isinstance(value, (int, float)):
        return number(text.replace(",", "")) == value
    return str(value) == text


def value_of(content: Any, expression: str) -> Any:
    """A path, or several with `over`, `times`, `minus`, `plus` between them, from the left."""
    first, *rest = OPERATION.split(expression)
    value = lookup(content, first)
    for operation, path in zip(rest[::2], rest[1::2], strict=True):
        other = lookup(content, path)
        value = {
            "over": lambda a, b: a / b,
            "times": lambda a, b: a * b,
            "minus": lambda a, b: a - b,
            "plus": lambda a, b: a + b,
        }[operation](value, other)
    return value


def filled(content: Any, template: str) -> str:
    """A template with the values of its `{expression:format}`."""

    def value(match: re.Match[str]) -> str:
        expression, _, form = match[1].rpartition(":") if ":" in match[1] else (match[1], "", "")
        return format(value_of(content, expression), form)

    return re.sub(r"\{([^}]*)\}", value, template)


def like(text: str, value: Any) -> str:
    """A value written as `text` is: decimals, thousands, per cent."""
    digits = re.fullmatch(r"-?[\d,]+(?:\.(\d+))?(%?)", text)
    if not digits:
        raise FigureError(f"{text!r} is no single figure; write {{path:format}} on the right")
    thousands = "," if "," in text or (len(text.partition(".")[0]) < 4) else ""
    return format(value, f"{thousands}.{len(digits[1] or '')}{'%' if digits[2] else 'f'}")
