"""`specformer train`: what its flags mean, their defaults, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

NEEDED = ("--target", "t", "--data", "d", "--out", "o")
DEFAULTS = {
    "target": "t",
    "data": ("d",),
    "out": "o",
    "finish": None,
    "revision": None,
    "target_name": None,
    "partial_data": False,
    "init": None,
    "preset": "default",
    "slots": 8,
    "slot_layers": None,
    "markov_rank": None,
    "markov_gate": None,
    "draft_vocab": None,
    "hooks": None,
    "slot_mask": None,
    "context_window": None,
    "context_sinks": None,
    "bonus_embedding": None,
    "nested_slots": None,
    "intermediate_size": None,
    "epochs": 3,
    "max_steps": None,
    "max_hours": None,
    "batch_tokens": 4096,
    "batch_size": None,
    "max_length": 2048,
    "accumulate": 1,
    "anchors_per_text": None,
    "optimizer": "muon",
    "learning_rate": None,
    "vector_learning_rate": None,
    "weight_decay": 0.01,
    "scheduler": None,
    "warmup": 0.05,
    "clip": 1.0,
    "slot_weights": "decay",
    "slot_counts": None,
    "kl_weight": None,
    "tv_weight": 0.0,
    "lk_weight": 0.0,
    "sample_vocab": None,
    "eval_share": 0.05,
    "eval_texts": None,
    "eval_every": None,
    "save_every": None,
    "log_every": 10,
    "seed": 0,
    "dtype": "auto",
    "device": "auto",
    "memory": None,
    "cache_states": 0.0,
    "states": "transformers",
    "states_disk": 8.0,
    "served_model": None,
    "engine_args": {},
    "engine_devices": None,
}


def test_defaults(typed: Callable[..., Any]) -> None:
    assert typed("train", *NEEDED).model_dump() == DEFAULTS


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (("--hooks", "0,3,5,6"), {"hooks": (0, 3, 5, 6)}),
        (("--slot-counts", "2,8"), {"slot_counts": (2, 8)}),
        (("--anchors-per-text", "all"), {"anchors_per_text": "all"}),
        (("--data", "e", "f"), {"data": ("d", "e", "f")}),
        (("--max-hours", "1.5"), {"max_hours": 1.5}),
        (("--bonus-embedding",), {"bonus_embedding": True}),
        (("--no-nested-slots",), {"nested_slots": False}),
        (("--partial-data",), {"partial_data": True}),
        (("--partial-data", "--no-partial-data"), {}),
        (("--optimizer", "adamw"), {"optimizer": "adamw"}),
        (("--learning-rate", "5e-4"), {"learning_rate": 5e-4}),
    ],
)
def test_flags(
    typed: Callable[..., Any], arguments: tuple[str, ...], changes: dict[str, Any]
) -> None:
    assert typed("train", *NEEDED, *arguments).model_dump() == DEFAULTS | changes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--slots", "65"), "--slots 65: Input should be less than or equal to 64"),
        (("--preset", "x"), "--preset x: Input should be 'default' or 'paper'"),
        (
            ("--slot-counts", "9"),
            "--slot-counts 9: expected numbers from 1 to 8 (--slots)",
        ),
    ],
)
def test_refusals(refused: Callable[..., str], more: tuple[str, ...], message: str) -> None:
    assert refused("train", *NEEDED, *more) == message
