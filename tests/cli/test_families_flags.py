"""`specformer families`: what its flags mean, their defaults, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_specformer.cli.main import main

DEFAULTS = {"all": False, "as_json": False, "record": False, "update": None}


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ((), {}),
        (("--all",), {"all": True}),
        (("--json",), {"as_json": True}),
        (("--record",), {"record": True}),
        (("--update", "page.md", "r.csv"), {"update": (Path("page.md"), Path("r.csv"))}),
    ],
)
def test_every_flag(
    typed: Callable[..., Any], arguments: tuple[str, ...], changes: dict[str, Any]
) -> None:
    assert typed("families", *arguments).model_dump() == DEFAULTS | changes


def test_refusals(refused: Callable[..., str]) -> None:
    assert refused("families", "--json", "--all") == (
        "--json: not allowed with --all; leave one of them out"
    )
    with pytest.raises(SystemExit, match="2"):  # one of its two values is missing
        main(["families", "--update", "page.md"])
