"""The clock of benchmarks/step_profile.py: every moment counts for one part."""

from __future__ import annotations

import time

import pytest
from step_profile import PARTS, REST, Clock, medians, table


def test_time_of_parts_excludes_the_parts_within() -> None:
    clock = Clock()
    inner = clock.around("target forward", lambda: time.sleep(0.03))

    def around() -> None:
        time.sleep(0.01)
        inner()
        time.sleep(0.01)

    outer = clock.around("runner: the rest", around)
    started = time.perf_counter()
    spent = clock.step(outer)
    whole = time.perf_counter() - started
    assert spent["target forward"] >= 0.03
    assert 0.02 <= spent["runner: the rest"] <= whole - 0.03
    assert 0.05 <= sum(spent.values()) <= whole
    assert clock.step(lambda: time.sleep(0.01))["target forward"] == 0


def test_a_part_that_fails_gives_the_clock_back() -> None:
    clock = Clock()
    with pytest.raises(ZeroDivisionError):
        clock.around("scheduler", lambda: 1 / 0)()
    assert clock.step(lambda: time.sleep(0.01))[REST] >= 0.01


def test_table_shows_arms_side_by_side() -> None:
    figures = {
        "none": {"1": {"step": 0.004, "parts": {"target forward": 0.003}}},
        "K=4": {"1": {"step": 0.007, "parts": {"target forward": 0.0035, "draft: logits": 1e-4}}},
    }
    assert table(figures, [1]).splitlines() == [
        "| ms | none, 1 | K=4, 1 |",
        "|---|---|---|",
        "| **step** | 4.00 | 7.00 |",
        "| target forward | 3.00 | 3.50 |",
        "| draft: logits |  | 0.10 |",
    ]


def test_a_draft_is_told_with_its_share_of_attention() -> None:
    nothing = dict.fromkeys([*PARTS, REST], 0.0)
    draft = {"draft: anchor attention": 1.0, "draft: rotate and store K/V": 1.0}
    steps = [nothing | draft | {"draft: logits": 2.0, "scheduler": n} for n in (1.0, 2.0, 9.0)]
    found = medians(steps)
    assert (found["step"], found["draft"], found["attention_and_store_share"]) == (6.0, 4.0, 0.5)
    lines = table({"K=4": {"1": found}}, [1]).splitlines()
    assert lines[3] == "| **draft** | 4000.00 |"
    assert lines[-1] == "| attention and store, of the draft | 50% |"
    plain = medians([nothing | {"scheduler": 1.0}])
    assert plain == {"step": 1.0, "parts": {"scheduler": 1.0}}
