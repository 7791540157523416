"""The serving benchmark's arithmetic; no engine is started."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="extra [bench]")
pytest.importorskip("rich", reason="extra [bench]")

from serving_arm import ARMS, BASELINE
from serving_cpu import PROMPTS_AT, TEMPERATURES, schedule
from serving_report import summarise, write


def row(number: int, arm: str, seconds: float, steps: int, accepted: list[int]) -> dict[str, Any]:
    return {
        "round": number,
        "arm": arm,
        "temperature": 0.0,
        "concurrency": 4,
        "seconds": seconds,
        "cpu_seconds": seconds / 2,
        "draft_seconds": seconds / 4 if accepted else 0.0,
        "steps": steps,
        "tokens": 104,
        "decode_tokens": 100,
        "decode_request_steps": 40 if accepted else 100,
        **({"drafts": 40, "accepted_tokens_per_pos": accepted} if accepted else {}),
    }


ROWS = [
    row(0, "none", 2.0, 100, []),
    row(0, "specformer", 1.0, 50, [30, 20]),
    row(1, "none", 4.0, 100, []),
    row(1, "specformer", 1.0, 50, [34, 16]),
]


def test_schedule_gives_every_round_all_arms_and_each_its_turn_to_be_first() -> None:
    arms = list(ARMS)
    plan = list(schedule(3, arms))
    assert len(plan) == len(set(plan)) == 3 * len(TEMPERATURES) * len(PROMPTS_AT) * len(arms)
    groups = [plan[i : i + len(arms)] for i in range(0, len(plan), len(arms))]
    assert all(len({step[:3] for step in group}) == 1 for group in groups)
    assert {group[0][3] for group in groups} == set(arms)


def test_summary_pairs_the_rounds() -> None:
    none, specformer = summarise(ROWS)
    assert (none["arm"], none["ratio"]) == (BASELINE, 1.0)
    assert none["acceptance_per_position"] == []
    assert specformer["ratio"] == 3.0  # the median of 2 and 4
    assert (specformer["ratio_min"], specformer["ratio_max"]) == (2.0, 4.0)
    assert specformer["tokens_per_step"] == 2.5
    assert specformer["acceptance_per_position"] == [0.8, 0.45]
    assert specformer["ms_per_step"] == 20.0
    assert specformer["draft_share"] == 0.25


def test_files_are_written(tmp_path: Path) -> None:
    write(tmp_path / "serving", ROWS, {"summary": summarise(ROWS)})
    with (tmp_path / "serving.csv").open() as file:
        assert [line["arm"] for line in csv.DictReader(file)] == [r["arm"] for r in ROWS]
    assert json.loads((tmp_path / "serving.json").read_text())["summary"]
    assert (tmp_path / "serving.png").stat().st_size > 0
