"""Tables of the comparison with other heads: means over seeds, gains in pairs, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peers import report
from peers.__main__ import keep, row_of
from peers.plan import DRAFTED, KINDS, Head, heads
from peers.served import prompts_of


def row(kind: str, budget: int, seed: int, speed: float, rate: float = 1) -> dict[str, Any]:
    group = {f"K={k}": {"tokens_per_step": speed + k / 10, "stderr": 0.1} for k in DRAFTED}
    both = {"all": group, "less_repetitive_half": group}
    return {
        "kind": kind,
        "budget": budget,
        "seed": seed,
        "rate": rate,
        "training": {"parameters": 1234567, "texts": 2000 + 200 * seed},
        "replay": {t: both for t in ("0", "0.7", "1")},
    }


def line(text: str, start: str) -> list[str]:
    """Cells of the first line of a table that starts so."""
    found = next(one for one in text.splitlines() if one.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_seeds_are_averaged_and_what_is_missing_is_told(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for seed, speed in ((0, 1.0), (1, 1.5)):
        keep(row("eagle3", 240, seed, speed), tmp_path)
    keep(row("eagle3", 240, 0, 1.2, rate=4), tmp_path)
    keep(row("specformer", 240, 0, 2.0), tmp_path)
    report.write(tmp_path, document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    peer = line(text, "EAGLE-3")
    assert peer[1:6] == ["2", "1,234,567", "2,100", "1.45 ± 0.25", "1.65 ± 0.25"]
    assert line(text, "EAGLE-3, 4 times the rates")[4:6] == ["1.40", "1.60"]
    assert line(text, "SpecFormer")[5] == "2.40"
    assert "EAGLE-3" not in text[text.index("Not run") :].split(";")[0]
    assert "SpecFormer at 240 cpu-seconds with seed 1" in text
    assert "all heads at 4,000 cpu-seconds with seed 0" in text
    assert f"({report.PLOT})" in text
    assert (tmp_path / report.PLOT).stat().st_size > 1000
    lines = (tmp_path / report.FLAT).read_text().splitlines()
    assert lines[0].startswith("head,target,cpu_seconds,seed,rate,temperature,k,tokens_per_step")
    assert "eagle3,python-target,240,1,1,0.7,4,1.9,0.1,1.9,1234567" in lines
    assert len(lines) == 1 + 4 * 3 * len(DRAFTED)


def test_before_the_first_result_everything_is_missing(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"{report.BEGIN}{report.END}")
    report.write(tmp_path, document)
    text = document.read_text()
    assert "all heads at 240 cpu-seconds with seed 0" in text
    assert "Not run: serving" in text
    assert not (tmp_path / report.PLOT).exists()


def test_a_later_result_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    keep(row("dflash", 240, 0, 1.0), tmp_path)
    keep(row("dflash", 240, 0, 3.0), tmp_path)
    found = row_of(Head("dflash", 240, 0), tmp_path)
    assert found is not None
    assert found["replay"]["0"]["all"]["K=2"]["tokens_per_step"] == pytest.approx(3.2)
    assert len(report.read(tmp_path)) == 1
    assert row_of(Head("dflash", 240, 1), tmp_path) is None


def test_gains_are_taken_round_by_round(tmp_path: Path) -> None:
    """Each round of a head is held against the same round without speculation."""
    path = tmp_path / report.SERVED
    rows = []
    for number, slow in ((0, 1.0), (1, 10.0), (2, 1.0)):
        shared = {"requests": 4, "round": number, "tokens": 100}
        rows.append({"kind": "none", "seconds": 2 * slow, "cpu_seconds": 2.0} | shared)
        counted = {"num_drafts": 40, "num_accepted_tokens": 60}
        rows.append({"kind": "dflash", "seconds": slow, "cpu_seconds": 1.6} | counted | shared)
    rows.append({"kind": "peagle", "failure": "no such method"})
    path.write_text(json.dumps({"budget": 240, "K": 4, "rows": rows}))
    text = "\n".join(report.served_table(path))
    assert line(text, "DFlash") == ["DFlash", "4", "2.50", "1.25 (1.25-1.25)", "2.00 (2.00-2.00)"]
    assert "P-EAGLE did not start: no such method" in text
    assert "Not run: 1, 16, 64 requests" in text


def test_short_budgets_have_two_seeds_and_ours_comes_last() -> None:
    asked = heads((1000, 240, 4000), None, KINDS)
    assert [(h.budget, h.seed) for h in asked[:: len(KINDS)]] == [
        (240, 0), (240, 1), (1000, 0), (1000, 1), (4000, 0),
    ]  # fmt: skip
    assert asked[len(KINDS) - 1].is_ours


def test_rounds_ask_other_prompts() -> None:
    texts = [[number] for number in range(5)]
    assert prompts_of(texts, 3, 0) == [[0], [1], [2]]
    assert prompts_of(texts, 3, 1) == [[3], [4], [0]]
