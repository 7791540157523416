"""`specformer distill`: what its flags mean, their defaults, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("--target", "t", "--prompts", "p", "--out", "o")
NEEDED_VALUES = {"target": "t", "prompts": (Path("p"),), "out": Path("o")}


def test_defaults(typed: Callable[..., Any]) -> None:
    assert typed("distill", *NEEDED).model_dump() == NEEDED_VALUES | {
        "revision": None,
        "max_prompts": None,
        "max_bad_lines": None,
        "shard_size": None,
        "temperature": 0.0,
        "sampled_share": 0.25,
        "sampled_temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 1024,
        "seed": 0,
        "chat_template": None,
        "chat_template_args": {},
        "engine": "offline",
        "dtype": "auto",
        "max_model_len": None,
        "engine_args": {},
        "served_model": None,
        "concurrency": 64,
    }


def test_every_flag(typed: Callable[..., Any]) -> None:
    drawn = ("--max-prompts", "9", "--max-bad-lines", "0", "--shard-size", "3", "--seed", "-1")
    sampled = ("--temperature", "0.5", "--sampled-share", "1", "--sampled-temperature", "2")
    template = ("--top-p", "0.9", "--chat-template", "c", "--chat-template-args", '{"a": false}')
    engine = ("--max-tokens", "7", "--max-model-len", "99", "--dtype", "float32")
    given = typed(
        *("distill", "--target", "t", "--prompts", "p", "q", "--out", "o", "--revision", "r"),
        *(*drawn, *sampled, *template, *engine, "--engine-args", '{"seed": 1}'),
    )
    assert given.model_dump() == NEEDED_VALUES | {
        "prompts": (Path("p"), Path("q")),
        "revision": "r",
        "max_prompts": 9,
        "max_bad_lines": 0,
        "shard_size": 3,
        "temperature": 0.5,
        "sampled_share": 1.0,
        "sampled_temperature": 2.0,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": -1,
        "chat_template": Path("c"),
        "chat_template_args": {"a": False},
        "engine": "offline",
        "dtype": "float32",
        "max_model_len": 99,
        "engine_args": {"seed": 1},
        "served_model": None,
        "concurrency": 64,
    }
    served = typed(
        *("distill", *NEEDED, "--engine", "http://host:1", "--served-model", "m"),
        *("--concurrency", "8"),
    )
    assert (served.engine, served.served_model, served.concurrency) == ("http://host:1", "m", 8)
    assert not served.offline


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-prompts", "0"), "--max-prompts: expected a whole number above 0, found '0'"),
        (("--seed", "x"), "--seed: expected a whole number, found 'x'"),
        (("--sampled-share", "nan"), "--sampled-share: expected a number from 0 to 1, found 'nan'"),
        (("--top-p", "1.1"), "--top-p: expected a number above 0, at most 1, found '1.1'"),
        (("--engine-args", "[1]"), "--engine-args: expected a JSON object, found '[1]'"),
        (
            ("--served-model", "m"),
            "--served-model has no effect with --engine offline; leave it out",
        ),
    ],
)
def test_refusals(refused: Callable[..., str], more: tuple[str, ...], message: str) -> None:
    assert refused("distill", *NEEDED, *more) == message
