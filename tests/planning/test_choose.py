"""The choice of K: from costs and acceptance to a schedule that vLLM takes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_specformer.engine.speculative_config import CONFIDENCE, split_own_fields
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.planning.acceptance import from_evaluation
from vllm_specformer.planning.chips import CHIPS
from vllm_specformer.planning.choose import (
    PlanRow,
    best_count,
    best_count_with_cut,
    between,
    break_even,
    combine,
    cut_schedule,
    schedule,
    thresholds,
)
from vllm_specformer.planning.paper import rows_on_paper
from vllm_specformer.planning.plan_file import Plan, read_plan
from vllm_specformer.planning.report import plot, print_plan
from vllm_specformer.shapes import HeadShape, TargetShape

QWEN3_8B = TargetShape(36, 4096, 32, 8, 128, 12288, 151936)
ACCEPTED = {0: 1.0, 2: 2.0, 4: 2.5, 8: 2.8}


def row(batch: int, count: int, ratio: float) -> PlanRow:
    return PlanRow(batch, count, tokens_per_step=ratio, plain=1.0, step=1.0, draft=0.1)


def rows() -> list[PlanRow]:
    """Costs of a machine where rows are free until 32 of them, then cost 1 each."""
    plain = {batch: max(32.0, batch) for batch in (1, 4, 16, 64)}
    steps = {(b, k): max(32.0, b * (k + 1)) for b in plain for k in ACCEPTED}
    return combine(plain, steps, dict.fromkeys(steps, 0.0), ACCEPTED)


def test_gain_is_tokens_per_step_over_the_cost_of_a_step() -> None:
    found = {(row.batch, row.count): row.ratio for row in rows()}
    assert found[1, 8] == 2.8
    assert found[4, 8] == pytest.approx(2.8 * 32 / 36)
    assert found[16, 4] == pytest.approx(2.5 * 32 / 80)
    assert found[64, 0] == 1.0
    assert found[64, 4] == pytest.approx(2.5 / 5)


def test_best_count_gains_most_or_is_none() -> None:
    assert best_count([row(1, 0, 0.98), row(1, 2, 1.5), row(1, 4, 1.4)]) == 2
    assert best_count([row(1, 0, 0.98), row(1, 2, 0.99), row(1, 4, 0.7)]) == 0
    assert best_count([row(1, 0, 0.98), row(1, 2, 0.99), row(1, 4, 0.7)], margin=0.0) == 2
    assert best_count([row(1, 2, 0.99), row(1, 4, 1.1)]) == 4
    assert best_count([row(1, 2, 0.99), row(1, 4, 1.01)]) == 0
    # Where K = 0 is dear, a smaller loss is the better choice.
    assert best_count([row(1, 0, 0.7), row(1, 2, 0.9)]) == 2


def test_schedule_follows_the_costs_between_measured_batch_sizes() -> None:
    found = schedule(rows())
    lookup = build_dynamic_sd_schedule_lookup(found, 64, 8)  # vLLM's own reading of it
    assert lookup[1] == lookup[3] == 8
    assert lookup[64] == lookup[40] == 0
    for batch in range(1, 65):
        assert lookup[batch] == best_count(between(rows(), batch))
    assert found[0][0] == 1
    assert found[-1][1] == 64
    assert all(a[2] != b[2] and a[1] + 1 == b[0] for a, b in itertools.pairwise(found))


def test_a_draft_pays_from_the_chance_that_its_row_costs() -> None:
    free = [PlanRow(8, count, 1 + 0.5 * count, 10.0, 10.0, 0.0) for count in (0, 2, 4)]
    assert break_even(free) == 0
    # Two drafts are 4 s and drafting 1 s more; three tokens in 15 s are the best that it brings.
    dear = [
        PlanRow(8, 0, 1.0, 10.0, 10.0, 0.0),
        PlanRow(8, 2, 3.0, 10.0, 15.0, 1.0),
        PlanRow(8, 4, 3.5, 10.0, 19.0, 1.0),
    ]
    assert break_even(dear) == pytest.approx(2.0 * 3 / 15)
    assert break_even([replace(row, step=1.0 + 50 * row.count) for row in dear]) == 1
    assert break_even(dear[:1]) == 0


def test_with_a_cut_only_the_slots_cost_decides() -> None:
    def costs(per_slot: float, per_row: float) -> list[PlanRow]:
        gains = {0: 1.0, 2: 2.0, 4: 2.5, 8: 2.8}
        return [
            PlanRow(8, k, gain, 10.0, 10.0 + k * (per_slot + per_row), k * per_slot)
            for k, gain in gains.items()
        ]

    assert best_count(costs(0.0, 5.0)) == 0  # two rows for one token more
    assert best_count_with_cut(costs(0.0, 5.0)) == 8  # one row for it, and slots are free
    assert best_count_with_cut(costs(1.0, 5.0)) == 2
    assert best_count_with_cut(costs(9.0, 5.0)) == 0
    assert best_count_with_cut(costs(0.0, 20.0)) == 0
    assert cut_schedule(costs(1.0, 5.0)) == [[1, 8, 2]]
    assert cut_schedule(costs(1.0, 5.0), margin=5.0) == [[1, 8, 0]]


def test_thresholds_rise_with_the_batch() -> None:
    found = thresholds(rows())
    assert found[0][0] == 1
    assert found[0][2] == 0
    assert found[-1][1] == 64
    assert all(a[2] < b[2] and a[1] + 1 == b[0] for a, b in itertools.pairwise(found))
    (_, own) = split_own_fields(Plan.of(rows(), {}, 0.02).confident_config("HEAD"))
    assert own.confidence == tuple((a, b, bar) for a, b, bar in found)


def test_between_measured_batch_sizes_costs_are_straight_lines() -> None:
    (middle,) = between(
        [PlanRow(4, 2, 2.0, 10, 20, 4, 1, 3), PlanRow(8, 2, 2.0, 30, 60, 8, 3, 5)], 6
    )
    assert middle == PlanRow(6, 2, 2.0, 20, 40, 6, 2, 4)
    measured = [row(4, 2, 1.5), row(8, 2, 1.2)]
    assert [between(measured, batch)[0].ratio for batch in (1, 4, 8, 99)] == [1.5, 1.5, 1.2, 1.2]


def test_on_paper_small_batches_draft_and_large_ones_do_not() -> None:
    head = HeadShape.default_for(QWEN3_8B)
    batches = (1, 8, 64, 512)
    found = rows_on_paper(CHIPS["h200"], QWEN3_8B, head, batches, ACCEPTED, 1000)
    gains = {(row.batch, row.count): row.ratio for row in found}
    assert 2.4 < gains[1, 8] < 2.8
    assert gains[512, 8] < 0.8
    assert 0.97 < gains[512, 0] < 1
    plan = Plan.of(found, {}, 0.02)
    assert plan.count_at(1) == 8
    assert plan.count_at(512) < 4


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = Plan.of(rows(), {"costs": "made up"}, 0.03)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json("HEAD")))
    again = read_plan(path)
    assert again == plan
    assert again.predicted(4, 8) == pytest.approx(2.8 * 32 / 36)
    assert again.predicted(4, 3) is None
    config = json.loads(path.read_bytes())["speculative_config"]
    assert config["num_speculative_tokens"] == 8
    assert config["num_speculative_tokens_per_batch_size"] == plan.schedule


def test_a_plan_that_never_pays_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.of([row(1, 0, 0.99), row(1, 4, 0.8), row(8, 0, 0.99), row(8, 4, 0.5)], {}, 0.02)
    assert plan.schedule == [[1, 8, 0]]
    assert plan.to_json("HEAD")["speculative_config"] is None
    print_plan(plan, "HEAD")
    assert "Speculation pays at none of these batch sizes" in capsys.readouterr().out
    dear = Plan.of([row(1, 0, 0.7), row(1, 4, 0.9)], {}, 0.02)
    assert dear.schedule == [[1, 1, 4]]
    assert not dear.pays


def test_a_plan_names_where_it_loses(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.of([row(1, 0, 0.9), row(1, 4, 1.5), row(8, 0, 0.9), row(8, 4, 0.5)], {}, 0.02)
    assert plan.gains() == {1: 1.5, 8: 0.9}
    print_plan(plan, "HEAD")
    assert "Even the best K loses 10% at 8 requests: a server" in capsys.readouterr().out
    more = [row(16, 0, 0.996), row(16, 4, 0.5)]
    print_plan(Plan.of([*plan.rows, *more], {}, 0.02), "HEAD")
    told = "Even the best K loses 10% at 8 requests, 0.4% at 16 requests: a server"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"cycles": 1}, "Costs come from 1 cycle, a single reading, and may be noise"),
        ({"cycles": 2}, "Costs come from 2 cycles and may be noise; the default is --cycles 3."),
        ({"cycles": 3}, ""),
        ({}, ""),  # on paper, or under load
    ],
)
def test_a_plan_of_few_readings_says_so(
    about: dict[str, int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(Plan.of(rows(), about, 0.02), "HEAD")
    printed = capsys.readouterr().out
    assert said in printed
    assert ("may be noise" in printed) == bool(said)


def test_what_is_printed_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(Plan.of([row(1, 0, 0.9), row(1, 4, 1.5)], {"costs": "made up"}, 0.02), "HEAD")
    printed = " ".join(capsys.readouterr().out.split())
    assert "1.50 (1e+02 ms)" in printed
    assert "in brackets the time of a step that drafting takes" in printed
    assert "; made up" in printed
    assert "`specformer bench --schedule` measures both" in printed


def test_the_printed_line_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.of(rows(), {"target": "t"}, 0.02)
    print_plan(plan, "HEAD")
    printed = capsys.readouterr().out
    line = printed.partition("--speculative-config '")[2].partition("'")[0]
    assert json.loads(line) == plan.speculative_config("HEAD")
    assert "2.49" in printed  # 2.8 * 32 / 36
    assert plot(plan).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "value",
    [[], [[2, 4, 1]], [[1, 4, 1], [4, 8, 0]], [[1, 4, -1]], [[4, 1, 1]], [[1, 4]], [[1, 4, 1.5]]],
)
def test_schedules_that_vllm_would_not_take_are_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(value))
    with pytest.raises(SpecFormerError, match=r"--schedule .*; expected a schedule such as \[\[1"):
        read_plan(path)
    path.write_text("[[1, 8, 4], [9, 64, 0]]")
    assert read_plan(path) == Plan([[1, 8, 4], [9, 64, 0]])


def test_gaps_are_read_as_vllm_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    written = [[9, 12, 0], [1, 4, 3]]
    path.write_text(json.dumps(written))
    plan = read_plan(path)
    theirs = build_dynamic_sd_schedule_lookup(written, 16, 4)
    assert [plan.count_at(batch) for batch in range(1, 17)] == theirs[1:]
    own = split_own_fields({CONFIDENCE: [[9, 12, 0.5], [1, 4, 0.1]]})[1]
    assert own.confidence == ((1, 8, 0.1), (9, 12, 0.5))


def test_files_that_are_no_plan_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    with pytest.raises(SpecFormerError, match="not readable as JSON"):
        read_plan(path)
    path.write_text("{}")
    with pytest.raises(SpecFormerError, match="expected what `specformer plan --json` writes"):
        read_plan(path)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    counts = {
        "K=2": {"tokens_per_step": 2.1, "acceptance_per_position": [0.7, 0.4]},
        "K=4": {"tokens_per_step": 2.6, "acceptance_per_position": [0.7, 0.5, 0.3, 0.1]},
    }
    path = tmp_path / "eval.json"
    greedy = {"temperature": 0.0, "all": {"head": counts}}
    path.write_text(json.dumps({"offline": {"greedy": greedy}}))
    return path


def test_acceptance_of_an_evaluation(evaluation: Path) -> None:
    found = from_evaluation(evaluation, [0, 2, 3, 4])
    assert found == {0: 1.0, 2: 2.1, 3: pytest.approx(1 + 0.7 + 0.5 + 0.3), 4: 2.6}
    with pytest.raises(SpecFormerError, match=r"has no figures for 8 drafted tokens or more"):
        from_evaluation(evaluation, [8])
    with pytest.raises(SpecFormerError, match=r"--temperature 1: .* has temperature 0 only"):
        from_evaluation(evaluation, [2], temperature=1.0)
    content = json.loads(evaluation.read_bytes())
    drawn = {"K=2": {"tokens_per_step": 2.0, "acceptance_per_position": [0.6, 0.4]}}
    methods = content["offline"]["greedy"]["all"] | {"head_drawn": drawn}
    content["offline"]["sampled"] = {"temperature": 1.0, "all": methods}
    evaluation.write_text(json.dumps(content))
    assert from_evaluation(evaluation, [2], temperature=1.0) == {2: 2.0}  # what is served
    evaluation.write_text("[]")
    with pytest.raises(SpecFormerError, match="not what `specformer eval --json` writes"):
        from_evaluation(evaluation, [2])
