"""Figures in documents that are taken from results files, checked and updated.

    cd tests && python -m support.figures           # what differs
    cd tests && python -m support.figures --update  # writes the results' figures

A comment below a table or some paragraphs names the results file and what its figures are. It is
about what stands above it, up to the comment before or the heading.

    | 1 | 2.85 (2.69-3.01) | 0.98 |
    It is 2.4% of the step, 10 or 12 ms.

    <!-- figures: benchmarks/results/NAME.json
    | $1 | {rows[k=$1]/ratio:.2f} ({rows[k=$1]/low:.2f}-{rows[k=$1]/high:.2f}) | {theta} |
    2.4% = {draft over step:.1%}
    10 or 12 ms = {a times 1000:.0f} or {b times 1000:.0f} ms
    0.98 = theta
    -->

A row with `$1` is the form of all rows of the table, `$1` being the row's own first cell, `$2` its
second; a row without is that of the row with the same first cell. `...` as the last cell repeats
the cell before it for all further columns, with `$head` for the column's heading. What is alone on
the right of `=` is written with as many decimals as on the left. A path goes through objects by
`/` (a name with one in quotes), into lists by `[number]` or by what an element has:
`[arm=k4,concurrency=1]`. Rows of a CSV file are such a list. `**` does not count.
`unchecked: REASON` stands for figures that no file has.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from support.paths import ROOT
from vllm_specformer.data.files import write_atomic

COMMENT = re.compile(r"<!-- figures: (\S+)\n(.*?)\n-->", re.DOTALL)
HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
STEP = re.compile(r'"([^"]*)"|([^/\[\]]+)|\[([^\]]*)\]')
OPERATION = re.compile(r" (over|times|minus|plus) ")
UNCHECKED = "unchecked"


class FigureError(Exception):
    """A reference leads nowhere, or what it is about is not there."""


@dataclass(frozen=True)
class Difference:
    """A text of a document, and what the results say."""

    found: str
    right: str


@dataclass(frozen=True)
class Part:
    """What stands above a comment, the file that it names, and its lines."""

    begin: int
    end: int
    above: str
    file: Path
    lines: list[str]

    def differences(self) -> Iterator[Difference]:
        content = results(self.file)
        rows = [cells(line) for line in self.lines if line.startswith("|")]
        if rows:
            yield from of_table(self.above, content, {row[0]: row for row in rows})
        for line in self.lines:
            if not line.startswith(("|", f"{UNCHECKED}:")):
                yield from of_text(self.above, content, line)


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
    """What lies at `a/b[0]/c[x=1,y=two]`; a number stands for itself."""
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
    wanted = dict(part.split("=", 1) for part in selection.split(","))
    found = [row for row in rows if all(same(row[key], text) for key, text in wanted.items())]
    if len(found) != 1:
        raise FigureError(f"[{selection}] is said of {len(found)} rows")
    return found[0]


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


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").replace("**", "").split("|")]


def parts(document: str) -> Iterator[Part]:
    for match in COMMENT.finditer(document):
        above = document[: match.start()]
        begin = max((one.end() for one in HEADING.finditer(above)), default=0)
        begin = max([begin, *(one.end() for one in COMMENT.finditer(above))])
        lines = match[2].splitlines()
        yield Part(begin, match.end(), above[begin:], ROOT / match[1], lines)


def differences(document: str) -> Iterator[Difference]:
    for part in parts(document):
        yield from part.differences()


def of_table(above: str, content: Any, templates: dict[str, list[str]]) -> Iterator[Difference]:
    head, *rows = [line for line in above.splitlines() if line.startswith("|")]
    heads = cells(head)
    seen = set()
    for row in rows[1:]:
        found = cells(row)
        template = templates.get(found[0]) or templates.get("$1") or general(templates)
        if template is None:
            raise FigureError(f"no form for the row {found[0]!r}")
        seen.add(template[0])
        right = [filled(content, cell) for cell in expanded(template, heads, found)]
        if right != found:
            yield Difference(row, f"| {' | '.join(right)} |")
    if missing := set(templates) - seen:
        raise FigureError(f"no row for {sorted(missing)}")


def general(templates: dict[str, list[str]]) -> list[str] | None:
    """The form of all rows in a table whose first cell is a figure, too."""
    return next((one for name, one in templates.items() if "{" in name), None)


def expanded(template: list[str], heads: list[str], row: list[str]) -> list[str]:
    """A template for a row's columns, with the row's own cells and the columns' heads put in."""
    if template[-1] == "...":
        template = template[:-1] + [template[-2]] * (len(heads) - len(template) + 1)
    if len(template) != len(heads):
        raise FigureError(f"{len(template)} cells for {len(heads)} columns: {template}")
    plain = [head.strip("`").replace("$", "") for head in heads]
    return [
        re.sub(r"\$(\d)", lambda m: row[int(m[1]) - 1], cell.replace("$head", head))
        for cell, head in zip(template, plain, strict=True)
    ]


def of_text(above: str, content: Any, line: str) -> Iterator[Difference]:
    text, sign, right = line.partition(" = ")
    if not sign:
        raise FigureError(f"neither a row nor `text = path`: {line}")
    flat = " ".join(above.replace("**", "").split())
    if not re.search(rf"(?<![\d.]){re.escape(text)}(?!\d|\.\d)", flat):
        raise FigureError(f"{text!r} does not stand above its reference")
    value = filled(content, right) if "{" in right else like(text, value_of(content, right))
    if value != text:
        yield Difference(text, value)


def updated(document: str) -> str:
    """The document with the results' figures, in its text and in the comments."""
    for part in reversed(list(parts(document))):
        text = document[part.begin : part.end]
        for one in list(part.differences()):
            words = r"\s+".join(re.escape(word) for word in one.found.split())
            exact = rf"(?<![\d.]){words}(?!\d|\.\d)"
            text = re.sub(exact, lambda _, right=one.right: right, text)
        document = document[: part.begin] + text + document[part.end :]
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the results' figures")
    update = parser.parse_args().update
    found = 0
    for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]):
        document = path.read_text()
        for difference in differences(document):
            found += 1
            print(f"{path.relative_to(ROOT)}: {difference.found}  ->  {difference.right}")
        if update:
            write_atomic(path, updated(document).encode())
    return 1 if found and not update else 0


if __name__ == "__main__":
    sys.exit(main())
