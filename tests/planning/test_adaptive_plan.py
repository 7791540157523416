"""What a plan expects of adaptive verification, and of every mechanism side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.paths import HEAD
from vllm_specformer.engine.speculative_config import (
    SCHEDULE,
    OwnFields,
    check_fields,
    split_own_fields,
)
from vllm_specformer.planning.acceptance import kept_of_evaluation
from vllm_specformer.planning.adaptive import adaptive_rows
from vllm_specformer.planning.choose import PlanRow, combine
from vllm_specformer.planning.plan_file import Plan, read_plan
from vllm_specformer.planning.report import print_plan

ACCEPTED = {0: 1.0, 2: 2.2, 4: 3.0}
BATCHES = (1, 8, 64)
# The first quarter of the drafts has most of what is accepted.
KEPT = {4: [0.0, 0.6, 0.85, 0.95, 1.0]}


def verified(rows: float) -> float:
    """Milliseconds of a machine on which 32 rows are free, and every further one costs."""
    return 10.0 + 0.25 * max(0, rows - 32)


def rows() -> list[PlanRow]:
    plain = {batch: verified(batch) for batch in BATCHES}
    drafts = {(b, k): 1.0 if k else 0.1 for b in BATCHES for k in ACCEPTED}
    steps = {(b, k): verified(b * (k + 1)) + cost for (b, k), cost in drafts.items()}
    return combine(plain, steps, drafts, ACCEPTED)


def at(found: list[PlanRow], batch: int, count: int) -> PlanRow:
    (row,) = [row for row in found if (row.batch, row.count) == (batch, count)]
    return row


def test_every_draft_where_rows_are_free_and_the_likeliest_where_they_are_not() -> None:
    found = adaptive_rows(rows(), KEPT)
    assert {row.count for row in found} == {0, 4}  # nothing is known of 2 drafts
    assert at(found, 1, 4) == at(rows(), 1, 4)
    assert at(found, 64, 0) == at(rows(), 64, 0)
    # At 64 requests a draft of each costs 16 ms: one in four drafts brings 1.2 tokens, two 1.7.
    few = {1 + share * 2: 19.0 + 16 * n for n, share in ((0, 0), (1, 0.6), (2, 0.85), (4, 1))}
    best = max(few, key=lambda gain: gain / few[gain])
    assert at(found, 64, 4).tokens_per_step == pytest.approx(best)
    assert at(found, 64, 4).ratio > at(rows(), 64, 4).ratio


def test_it_is_never_below_the_chain_of_as_many_drafts() -> None:
    for batch in BATCHES:
        assert at(adaptive_rows(rows(), KEPT), batch, 4).ratio >= at(rows(), batch, 4).ratio


def plan() -> Plan:
    return Plan.of(rows(), {}, 0.02, kept=KEPT)


def test_mechanisms_side_by_side() -> None:
    found = plan().mechanisms()
    assert list(found) == list(BATCHES)
    assert found[1]["none"] == pytest.approx(0.1)
    for batch, rates in found.items():
        assert list(rates) == ["none", "fixed", "schedule", "adaptive"]
        assert rates["schedule"] >= rates["fixed"] * 0.999
        own = at(rows(), batch, plan().fixed_count)
        assert rates["fixed"] == pytest.approx(batch * own.tokens_per_step / own.step)
    assert found[64]["adaptive"] > 1.05 * found[64]["schedule"]
    assert list(Plan.of(rows(), {}, 0.02).mechanisms()[1]) == ["none", "fixed", "schedule"]


def test_the_config_is_one_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    config = plan().adaptive_config(str(HEAD))
    assert config is not None
    assert config["enable_adaptive_verification"] is True
    assert config[SCHEDULE][-1][1] == BATCHES[-1]
    rest, own = split_own_fields(config)
    check_fields(rest)
    assert own == OwnFields()
    print_plan(plan(), "HEAD")
    printed = capsys.readouterr().out
    assert "Serve with adaptive verification" in printed
    assert "expected tokens/s, and over no speculation" in printed


def test_a_file_keeps_it_and_bench_predicts_by_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan().to_json("HEAD")))
    again = read_plan(path)
    assert again == plan()
    config = again.adaptive_config("HEAD")
    assert config is not None
    expected = again.with_adaptive(config)
    assert expected is not None
    ratio = expected.expected_ratio([50] * 128, 64, expected.count_at)
    chain = again.expected_ratio([50] * 128, 64, lambda batch: 4)
    assert ratio is not None
    assert chain is not None
    assert ratio > chain
    assert Plan.of(rows(), {}, 0.02).with_adaptive(config) is None


def test_what_an_evaluation_knows(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    group = {"temperature": 1.0, "all": {}, "kept_of_likeliest": {"K=4": KEPT[4]}}
    greedy = {"temperature": 0.0, "all": {}}
    path.write_text(json.dumps({"offline": {"greedy": greedy, "temperature_1": group}}))
    assert kept_of_evaluation(path, 1.0) == KEPT
    assert kept_of_evaluation(path, 0.0) == {}
