"""`specformer eval`: what its flags mean, their defaults, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEFAULTS = {
    "head": Path("h"),
    "target": None,
    "revision": None,
    "prompts": (),
    "data": None,
    "max_prompts": 256,
    "max_bad_lines": None,
    "chat_template": None,
    "chat_template_args": {},
    "num_speculative_tokens": None,
    "temperature": None,
    "tree_nodes": None,
    "fit_tree_ranking": False,
    "calibrate": False,
    "likeliest": False,
    "max_tokens": 128,
    "seed": 0,
    "dtype": "auto",
    "device": "auto",
    "serve": False,
    "engine_args": {},
    "json_file": None,
    "plot": None,
}


def test_defaults(typed: Callable[..., Any]) -> None:
    assert typed("eval", "h", "--data", "d").model_dump() == DEFAULTS | {"data": Path("d")}


def test_every_flag(typed: Callable[..., Any]) -> None:
    given = typed(
        *("eval", "h", "--target", "t", "--revision", "r", "--prompts", "p", "q"),
        *("--max-prompts", "5", "--max-bad-lines", "1", "--chat-template", "c"),
        *("--chat-template-args", '{"a": 1}', "--num-speculative-tokens", "4", "8"),
        *("--temperature", "0", "0.7", "--max-tokens", "9", "--seed", "3", "--dtype", "float16"),
        *("--tree-nodes", "8", "63", "--fit-tree-ranking", "--calibrate", "--likeliest"),
        *("--device", "cpu", "--serve", "--engine-args", '{"b": 2}'),
        *("--json", "j", "--plot", "x.png"),
    )
    assert given.model_dump() == {
        "head": Path("h"),
        "target": "t",
        "revision": "r",
        "prompts": (Path("p"), Path("q")),
        "data": None,
        "max_prompts": 5,
        "max_bad_lines": 1,
        "chat_template": Path("c"),
        "chat_template_args": {"a": 1},
        "num_speculative_tokens": (4, 8),
        "temperature": (0.0, 0.7),
        "tree_nodes": (8, 63),
        "fit_tree_ranking": True,
        "calibrate": True,
        "likeliest": True,
        "max_tokens": 9,
        "seed": 3,
        "dtype": "float16",
        "device": "cpu",
        "serve": True,
        "engine_args": {"b": 2},
        "json_file": Path("j"),
        "plot": Path("x.png"),
    }


def test_the_former_name_of_serve(
    typed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("eval", "h", "--data", "d", "--engine").serve
    assert capsys.readouterr().err == (
        "warning: --engine is called --serve now; the next release will not know --engine\n"
    )
    assert typed("eval", "h", "--data", "d", "--serve").serve
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of --prompts, --data is needed"),
        (
            ("--prompts", "p", "--data", "d"),
            "--data: not allowed with --prompts; leave one of them out",
        ),
        (
            ("--data", "d", "--temperature", "0", "2.1"),
            "--temperature: expected a number from 0 to 2, found '2.1'",
        ),
        (
            ("--data", "d", "--num-speculative-tokens", "0"),
            "--num-speculative-tokens: expected a whole number above 0, found '0'",
        ),
        (
            ("--data", "d", "--tree-nodes", "64"),
            "--tree-nodes: expected a whole number from 1 to 63, found '64'",
        ),
        (
            ("--data", "d", "--dtype", "int8"),
            "--dtype int8: Input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        (
            ("--data", "d", "--json", "no/file"),
            "--json: no/file: no such directory as no; create it",
        ),
    ],
)
def test_refusals(refused: Callable[..., str], arguments: tuple[str, ...], message: str) -> None:
    assert refused("eval", "h", *arguments) == message
