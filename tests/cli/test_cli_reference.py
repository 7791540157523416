"""docs/cli.md is what the commands take."""

from __future__ import annotations

from support.cli_reference import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "cd tests && python -m support.cli_reference"
