"""benchmarks/results/trees.json: its rows, and which of them a new replay leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import trees as script


def test_rows_of_the_engine_stay(tmp_path: Path) -> None:
    path = tmp_path / "trees.json"
    new = {"where": "replay", "nodes": 8, "max_tokens": 128}
    assert script.merged(path, [new])["rows"] == [new]
    engine = {"where": "engine", "nodes": 16, "max_tokens": 128}
    short, old = new | {"max_tokens": 72}, new | {"nodes": 4}
    path.write_text(json.dumps({"rows": [old, short, engine]}))
    assert script.merged(path, [new])["rows"] == [new, short, engine]


def test_rows_of_a_report() -> None:
    row = {"tokens_per_step": 3.0, "stderr": 0.1}
    report = {
        "max_tokens": 72,
        "offline": {
            "greedy": {"temperature": 0.0, "trees": {"chain K=8": row, "n=16": row}},
            "temperature_1": {"temperature": 1.0, "trees": {"n=16": row}},
        },
    }
    assert {r["max_tokens"] for r in script.rows(report)} == {72}
    found = [(r["rule"], r["temperature"], r["nodes"], r["where"]) for r in script.rows(report)]
    assert found == [
        ("chain, greedy drafts", 0.0, 8, "replay"),
        ("greedy", 0.0, 16, "replay"),
        ("coupled", 1.0, 16, "replay"),
    ]


def test_the_file_has_the_rows_of_the_command() -> None:
    rows = json.loads(script.RESULT.read_text())["rows"]
    replayed = [row for row in rows if row["where"] == script.REPLAY]
    sampled = {(row["temperature"], row["nodes"]) for row in replayed if row["rule"] == "coupled"}
    assert sampled == {(t, n) for t in (0.6, 1.0) for n in (8, 16, 32, 63)}
    assert {row["nodes"] for row in replayed if row["rule"] == "greedy"} == {8, 16, 32, 63}
    assert all(0 < row["stderr"] < row["tokens_per_step"] < 9 for row in replayed)
