"""The ablation's table: rows of heads that a run was not asked for stay as they were."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT


def row(arm: str, seed: int, speed: float) -> dict[str, Any]:
    fields = ("draft_ms", "tokens_per_step_k2", "tokens_per_step_k8", "less_repetitive_half_k4")
    more = ("lookup_3_k4", "lookup_3_less_repetitive_half_k4", "temperature_1_k4")
    return {
        "arm": arm,
        "seed": seed,
        "steps": 600,
        "parameters": 7,
        "tokens_per_step_k4": speed,
        **dict.fromkeys((*fields, *more, "share_of_bound_k4"), 1.5),
    } | {"tokens_per_step_k8": None}


def test_earlier_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "training" / "bundled_pair"))
    import ablation

    args = argparse.Namespace(results=tmp_path)
    ablation.write_results([row("half KL", 0, 2.0), row("half KL", 1, 2.5)], args)
    ablation.write_results([row("all KL", 0, 3.0), row("half KL", 1, 4.0)], args)
    with (tmp_path / "ablation.csv").open(newline="") as file:
        found = [
            (one["arm"], one["seed"], one["tokens_per_step_k4"], one["tokens_per_step_k8"])
            for one in csv.DictReader(file)
        ]
    assert found == [
        ("half KL", "0", "2.0", ""),
        ("half KL", "1", "4.0", ""),
        ("all KL", "0", "3.0", ""),
    ]
    table = (tmp_path / "ablation.md").read_text()
    assert "| half KL | 2 | 7 | 1.5 | 1.50 ± 0.00 | 3.00 ± 1.00 |" in table


def test_losses_have_a_table_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "training" / "bundled_pair"))
    import ablation

    args = argparse.Namespace(results=tmp_path)
    ablation.write_results([row("defaults", 0, 2.0), row("base", 0, 2.5)], args)
    assert "| defaults | 1 |" in (tmp_path / "losses.md").read_text()
    assert "defaults" not in (tmp_path / "ablation.md").read_text()
