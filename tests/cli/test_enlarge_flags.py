"""`specformer enlarge`: what its flags mean, their defaults, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("t", "h", "--out", "o")


def test_defaults(typed: Callable[..., Any]) -> None:
    assert typed("enlarge", *NEEDED).model_dump() == {
        "target": Path("t"),
        "head": Path("h"),
        "out": Path("o"),
        "parameters": 500_000_000,
        "layers": 16,
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.5B", 1_500_000_000), ("100M", 100_000_000), ("20k", 20_000), ("7", 7), ("0.001K", 1)],
)
def test_every_flag(typed: Callable[..., Any], text: str, size: int) -> None:
    given = typed("enlarge", *NEEDED, "--parameters", text, "--layers", "9")
    assert (given.parameters, given.layers) == (size, 9)


@pytest.mark.parametrize("text", ["many", "", "M", "0", "0M", "-1B", "nanM", "infB", "1e9B", "1.5"])
def test_sizes_that_are_none(refused: Callable[..., str], text: str) -> None:
    assert refused("enlarge", *NEEDED, f"--parameters={text}") == (
        f"--parameters: expected a number above 0 such as 500M or 1.5B, found {text!r}"
    )


def test_layers(refused: Callable[..., str]) -> None:
    assert refused("enlarge", *NEEDED, "--layers", "0") == (
        "--layers: expected a whole number above 0, found '0'"
    )
