"""`specformer check`: what its flags mean, their defaults, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_defaults(typed: Callable[..., Any]) -> None:
    assert typed("check", "h").model_dump() == {
        "head": Path("h"),
        "target": None,
        "revision": None,
        "num_speculative_tokens": None,
        "as_json": False,
    }


def test_every_flag(typed: Callable[..., Any]) -> None:
    given = typed(
        *("check", "h", "--target", "t", "--revision", "r", "--num-speculative-tokens", "4"),
        "--json",
    )
    assert given.model_dump() == {
        "head": Path("h"),
        "target": "t",
        "revision": "r",
        "num_speculative_tokens": 4,
        "as_json": True,
    }


def test_refusals(refused: Callable[..., str]) -> None:
    assert refused("check", "h", "--num-speculative-tokens", "four") == (
        "--num-speculative-tokens: expected a whole number above 0, found 'four'"
    )
