"""`specformer bench`: what its flags mean, their defaults, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_specformer.bench.settings import BenchSettings
from vllm_specformer.settings import SettingsError

NEEDED = ("h", "--prompts", "p", "--out", "o")


def test_defaults(typed: Callable[..., Any]) -> None:
    assert typed("bench", *NEEDED).model_dump() == {
        "head": Path("h"),
        "target": None,
        "revision": None,
        "out": Path("o"),
        "arms": None,
        "num_speculative_tokens": (2, 4, 8),
        "schedule": None,
        "speculative_config": {},
        "prompts": (Path("p"),),
        "concurrency": (1, 2, 4, 8, 16, 32, 64),
        "repeats": 3,
        "requests_per_slot": 4,
        "max_tokens": 128,
        "temperature": 0.0,
        "ignore_eos": False,
        "together": False,
        "engine_args": {},
    }


def test_every_flag(typed: Callable[..., Any]) -> None:
    given = typed(
        *("bench", "h", "--target", "t", "--revision", "r", "--out", "o"),
        *("--arms", "none", "k4", "--num-speculative-tokens", "1", "2", "--schedule", "s"),
        *("--speculative-config", 'a={"method": "ngram"}', "--speculative-config", "b-2={}"),
        *("--prompts", "p", "q", "--concurrency", "3", "--repeats", "1"),
        *("--requests-per-slot", "2", "--max-tokens", "9", "--temperature", "1"),
        *("--ignore-eos", "--together", "--engine-args", '{"max-model-len": 99}'),
    )
    assert given.model_dump() == {
        "head": Path("h"),
        "target": "t",
        "revision": "r",
        "out": Path("o"),
        "arms": ("none", "k4"),
        "num_speculative_tokens": (1, 2),
        "schedule": Path("s"),
        "speculative_config": {"a": {"method": "ngram"}, "b-2": {}},
        "prompts": (Path("p"), Path("q")),
        "concurrency": (3,),
        "repeats": 1,
        "requests_per_slot": 2,
        "max_tokens": 9,
        "temperature": 1.0,
        "ignore_eos": True,
        "together": True,
        "engine_args": {"max-model-len": 99},
    }
    assert given.max_model_len(1024) == 99


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--concurrency", "4", "-1"),
            "--concurrency: expected a whole number above 0, found '-1'",
        ),
        (("--repeats", "1.5"), "--repeats: expected a whole number above 0, found '1.5'"),
        (
            ("--speculative-config", "a"),
            "--speculative-config: expected NAME=JSON, found 'a'",
        ),
        (
            ("--speculative-config", "a=[]"),
            "--speculative-config: expected a JSON object, found '[]'",
        ),
        (
            ("--speculative-config", "a={}", "--speculative-config", "a={}"),
            "--speculative-config: every NAME may be given once, 'a' is there twice; rename one",
        ),
        (
            ("--engine-args", '{"served-model-name": "x"}'),
            "--engine-args: 'served-model-name' is set by the benchmark; leave it out",
        ),
    ],
)
def test_refusals(refused: Callable[..., str], more: tuple[str, ...], message: str) -> None:
    assert refused("bench", *NEEDED, *more) == message


def test_named_configs_may_be_ready_made() -> None:
    values: dict[str, Any] = {"head": "h", "out": "o", "prompts": ["p"]}
    given = BenchSettings.read(**values, speculative_config={"a": {"method": "ngram"}})
    assert given.speculative_config == {"a": {"method": "ngram"}}
    with pytest.raises(SettingsError, match="--speculative-config"):
        BenchSettings.read(**values, speculative_config={"a": 3})
