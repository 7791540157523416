"""docs/compatibility.md is the table with what was recorded, and the record is complete."""

from __future__ import annotations

from support.matrix.document import PATH, render
from support.matrix.features import ENGINES, REQUESTS, V1, V2
from support.matrix.records import read


def test_the_page_is_up_to_date() -> None:
    assert PATH.read_text() == render(), "run `make test-matrix`"


def test_every_row_was_run_on_v1() -> None:
    found = read(V1)
    assert found["requests"] == {r.name: r.expected for r in REQUESTS}
    assert found["engines"] == {e.name: e.expected[V1] for e in ENGINES if V1 in e.expected}


def test_what_was_run_on_v2_is_as_expected() -> None:
    """The interpreter is slow: rows without an outcome are shown as not run."""
    found = read(V2)
    assert found["requests"].items() <= {r.name: r.expected for r in REQUESTS}.items()
    assert found["engines"].items() <= {e.name: e.expected.get(V2, "") for e in ENGINES}.items()
