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
the right of `=` is written with as many decimals as on the left. `support.results` has the form of
paths. `**` does not count.
`<!-- unchecked: REASON -->`, or such a line among others, is for figures that no file has;
`<!-- made by ...: begin -->` stands before tables that a script writes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.paths import ROOT
from support.results import FigureError, filled, like, results, value_of
from vllm_specformer.data.files import write_atomic

COMMENT = re.compile(r"<!-- figures: (\S+)\n(.*?)\n-->", re.DOTALL)
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
UNCHECKED = re.compile(r"<!-- unchecked: (.+?) -->", re.DOTALL)
MADE = re.compile(r"<!-- (?:made by|table:).*?<!-- end.*?-->", re.DOTALL)
# What is no measurement: code, links, versions, papers.
NO_FIGURE = re.compile(
    r"`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|vLLM \*{0,2}[\d.]+\*{0,2}|SmolLM2\S*", re.DOTALL
)
MEASURE = re.compile(r"(?<![\w.])(?:\d+\.\d+(?![\w.]*\d)|\d+(?=%))")


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
            if not line.startswith(("|", "unchecked: ")):
                yield from of_text(self.above, content, line)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").replace("**", "").split("|")]


def without_blocks(document: str) -> str:
    """Blanks in place of code blocks, so that a shell's comments are no headings."""
    return FENCE.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), document)


def parts(document: str) -> Iterator[Part]:
    document = without_blocks(document)
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
            bold = [cell.strip().startswith("**") for cell in row.strip().strip("|").split("|")]
            shown = [
                f"**{cell}**" if is_bold else cell
                for cell, is_bold in zip(right, bold, strict=True)
            ]
            yield Difference(row, f"| {' | '.join(shown)} |")
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


def uncovered(document: str) -> Iterator[str]:
    """Decimal figures and shares of a page that no comment is about."""
    begin = 0
    rest = MADE.sub("", without_blocks(document))
    ends = re.compile(f"{COMMENT.pattern}|{UNCHECKED.pattern}", re.DOTALL)
    for match in [*ends.finditer(rest), None]:
        above = rest[begin : match.start() if match else None]
        begin = match.end() if match else begin
        *before, last = re.split(HEADING, above)
        for part in before:
            yield from figures_of(part, "")
        if match is None:
            yield from figures_of(last, "")
        elif match[0].startswith("<!-- figures"):
            yield from figures_of(last, match[2])


def figures_of(part: str, lines: str) -> Iterator[str]:
    """What of a part its comment does not name."""
    if re.search(r"^unchecked: .", lines, re.MULTILINE):
        return
    tables = "\n|" in part and not re.search(r"^\|", lines, re.MULTILINE)
    named = {text for line in lines.splitlines() for text in MEASURE.findall(line.split(" = ")[0])}
    for line in NO_FIGURE.sub(" ", part).splitlines():
        if tables or not line.startswith("|"):
            yield from (text for text in MEASURE.findall(line) if text not in named)


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
