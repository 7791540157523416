"""`specformer plan`: what its flags mean, their defaults, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_defaults(typed: Callable[..., Any]) -> None:
    assert typed("plan").model_dump() == {
        "head": None,
        "target": None,
        "revision": None,
        "batch": (1, 2, 4, 8, 16, 32, 64),
        "num_speculative_tokens": (2, 4, 8),
        "eval": None,
        "accepted": (),
        "temperature": 0.0,
        "prompts": (),
        "max_prompts": 64,
        "max_tokens": 128,
        "cycles": 3,
        "steps": 8,
        "seconds": 0.5,
        "engine_args": {},
        "bench": None,
        "chip": None,
        "bandwidth": 1.0,
        "arithmetic": 1.0,
        "context": 1024,
        "weight_bytes": 2.0,
        "margin": 0.02,
        "json_file": None,
        "plot": None,
    }


def test_every_flag(typed: Callable[..., Any]) -> None:
    given = typed(
        *("plan", "h", "--target", "t", "--revision", "r", "--batch", "1", "3"),
        *("--num-speculative-tokens", "5", "--eval", "e", "--accepted", "0.5", "0.25"),
        *("--temperature", "1", "--prompts", "p", "q", "--max-prompts", "6", "--max-tokens", "7"),
        *("--cycles", "1", "--steps", "2", "--seconds", "0", "--engine-args", '{"a": 1}'),
        *("--bench", "b", "--chip", "h200", "--bandwidth", "0.8", "--arithmetic", "0.7"),
        *("--context", "99", "--weight-bytes", "0.5", "--margin", "0.1"),
        *("--json", "j", "--plot", "x.png"),
    )
    assert given.model_dump() == {
        "head": Path("h"),
        "target": "t",
        "revision": "r",
        "batch": (1, 3),
        "num_speculative_tokens": (5,),
        "eval": Path("e"),
        "accepted": (0.5, 0.25),
        "temperature": 1.0,
        "prompts": (Path("p"), Path("q")),
        "max_prompts": 6,
        "max_tokens": 7,
        "cycles": 1,
        "steps": 2,
        "seconds": 0.0,
        "engine_args": {"a": 1},
        "bench": Path("b"),
        "chip": "h200",
        "bandwidth": 0.8,
        "arithmetic": 0.7,
        "context": 99,
        "weight_bytes": 0.5,
        "margin": 0.1,
        "json_file": Path("j"),
        "plot": Path("x.png"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1", "0"), "--batch: expected a whole number above 0, found '0'"),
        (("--accepted", "1.2"), "--accepted: expected a number from 0 to 1, found '1.2'"),
        (("--seconds", "-1"), "--seconds: expected a number of seconds, 0 or more, found '-1'"),
        (("--weight-bytes", "3"), "--weight-bytes: expected one of 0.5, 1, 2, 4, found 3"),
        (("--weight-bytes", "x"), "--weight-bytes: expected one of 0.5, 1, 2, 4, found 'x'"),
        (
            ("--engine-args", '{"model": "x"}'),
            "--engine-args: 'model' is set by the plan; leave it out",
        ),
        (("--plot", "no/x.png"), "--plot: no/x.png: no such directory as no; create it"),
    ],
)
def test_refusals(refused: Callable[..., str], arguments: tuple[str, ...], message: str) -> None:
    assert refused("plan", *arguments) == message
