"""Figures of the documents are those of the results files, and tables are what scripts make."""

from __future__ import annotations

import csv
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import candidates
import head_cost
import mechanisms
import pytest
import smollm2_figures
import yaml

from support.figures import cells, differences, uncovered, updated
from support.kv_groups.table import as_document
from support.paths import ROOT
from support.results import FigureError
from vllm_specformer.planning.chips import CHIPS
from vllm_specformer.planning.roofline import draft_step
from vllm_specformer.shapes import HeadShape

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def pages_of_results() -> list[Path]:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    (results,) = (part["Results"] for part in menu if "Results" in part)
    return [ROOT / name for name in results if isinstance(name, str)]


def table_of(document: Path, begin: str) -> str:
    """What stands behind a mark, up to the end of what a script made."""
    text = document.read_text()
    assert text.count(begin) == 1
    return text.partition(begin)[2].partition("<!-- end")[0].strip()


def result(name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((RESULTS / name).read_text())
    return content


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_figures_are_those_of_the_results(path: Path) -> None:
    assert not list(differences(path.read_text())), "make figures UPDATE=1"


@pytest.mark.parametrize("path", pages_of_results(), ids=lambda path: path.name)
def test_pages_of_results_have_no_figure_of_their_own(path: Path) -> None:
    assert not list(uncovered(path.read_text()))


def test_tables_that_scripts_write_are_those_of_their_results() -> None:
    """Of scripts that write into the page themselves."""
    smollm2 = smollm2_figures.document(result("smollm2.json")["offline"])
    assert table_of(smollm2_figures.DOCUMENT, smollm2_figures.BEGIN) == smollm2.strip()
    rows = candidates.document(result("candidates.json")["rows"])
    assert table_of(candidates.DOCUMENT, candidates.BEGIN) == rows.strip()
    with (RESULTS / "kv-groups.csv").open(newline="") as file:
        groups = as_document(list(csv.DictReader(file)))
    assert table_of(ROOT / "docs" / "kv-groups.md", "<!-- table: make kv-groups -->") == groups


@pytest.mark.parametrize(("part", "file"), [("", "ablation.md"), (", losses", "losses.md")])
def test_the_ablation_is_the_recorded_one(part: str, file: str) -> None:
    begin = f"<!-- made by examples/training/bundled_pair/ablation.py{part}: begin -->"
    made = table_of(ROOT / "docs" / "ablation.md", begin)
    assert made in (RESULTS / file).read_text()


def test_mechanisms_are_the_recorded_ones() -> None:
    """Tokens per second are recorded to a tenth, so a ratio may be off by one in the last place."""
    rows = [
        row | {"tokens_per_second": {int(n): r for n, r in row["tokens_per_second"].items()}}
        for row in result("mechanisms.json")["rows"]
    ]
    begin = "<!-- made by benchmarks/mechanisms.py: begin -->"
    shown = table_of(ROOT / "docs" / "gpu-predictions.md", begin)
    assert shown == "\n\n".join(mechanisms.table(rows, temperature) for temperature in (0, 1))


@pytest.mark.parametrize(
    ("document", "what"), [("training-cost.md", "training"), ("tensor-parallel.md", "sharding")]
)
def test_costs_on_paper_are_those_of_the_script(document: str, what: str) -> None:
    """The page may leave out rows."""
    begin = f"<!-- made by benchmarks/head_cost.py {what}: begin -->"
    shown = [
        row for row in table_of(ROOT / "docs" / document, begin).splitlines() if "---" not in row
    ]
    with redirect_stdout(io.StringIO()) as printed:
        head_cost.main([what])
    assert len(shown) > 3
    assert set(shown) <= set(printed.getvalue().splitlines())


def test_steps_with_long_contexts_are_those_of_the_roofline() -> None:
    begin = "<!-- made by vllm_specformer/planning/roofline.py: begin -->"
    shown = table_of(ROOT / "docs" / "long-contexts.md", begin).splitlines()[2:]
    assert len(shown) == 6
    whole = replace(HeadShape.default_for(mechanisms.TARGET), scored=32_000)
    heads = {"none": whole, "2,048 + 4": replace(whole, visible=2048 + 4)}
    for row in map(cells, shown):
        head, requests = heads[row[1]], int(row[0])
        steps = [draft_step(head, requests, 4, 1024 * context) for context in (1, 4, 32, 128)]
        milliseconds = [1000 * step.seconds(CHIPS["h200"]) for step in steps]
        found = [float(cell) for cell in row[2:]]
        wanted = [*milliseconds, milliseconds[3] / milliseconds[1]]
        assert found == pytest.approx(wanted, rel=0.003)


WRONG = """## A
| k | ratio |
|---|---|
| 1 | **1.50** |

It is 40%, or 0.25 s.

<!-- figures: {file}
| $1 | {{rows[k=$1]/ratio:.2f}} |
40% = share
0.25 s = {{rows[k=1]/ms over 1000:.2f}} s
-->
"""


def recorded(folder: Path, ratio: float) -> str:
    file = folder / f"{ratio}.json"
    content = {"share": 0.4, "rows": [{"k": 1, "ratio": ratio, "ms": 250}, {"k": 2, "ratio": 9}]}
    file.write_text(json.dumps(content))
    return WRONG.format(file=file)


def test_a_wrong_figure_is_found_and_mended(tmp_path: Path) -> None:
    assert not list(differences(recorded(tmp_path, 1.5)))
    document = recorded(tmp_path, 1.25)
    (found,) = differences(document)
    assert (found.found, found.right) == ("| 1 | **1.50** |", "| 1 | **1.25** |")
    assert not list(differences(updated(document)))
    wrong = document.replace("40%", "41%")
    assert ("41%", "40%") in [(one.found, one.right) for one in differences(wrong)]


def test_a_reference_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    document = recorded(tmp_path, 1.5)
    for right, wrong in [("= share", "= shares"), ("[k=1]/ms", "[k=3]/ms"), ("or 0.25", "or 0.3")]:
        with pytest.raises(FigureError):
            list(differences(document.replace(right, wrong)))


def test_figures_without_a_reference_are_told(tmp_path: Path) -> None:
    document = recorded(tmp_path, 1.5)
    assert not list(uncovered(document))
    assert list(uncovered(document + "\nAnd 2.5 of `3.5`.\n")) == ["2.5"]
    assert not list(uncovered(document + "\nAnd 2.5.\n\n<!-- unchecked: aim -->\n"))
    assert list(uncovered("| a |\n|---|\n| 7.5 |\n")) == ["7.5"]
