"""`specformer plan --bench`: the schedule out of what a comparison under load measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_specformer.cli.main import main
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.planning.from_bench import rows_from_bench
from vllm_specformer.planning.plan_file import read_plan

OURS = {"method": "specformer", "model": "HEAD"}
K2, K4 = OURS | {"num_speculative_tokens": 2}, OURS | {"num_speculative_tokens": 4}
# Tokens per second by concurrency.
SPEEDS = {
    "none": {1: 100.0, 8: 400.0, 64: 1000.0},
    "k2": {1: 160.0, 8: 500.0, 64: 1010.0},
    "k4": {1: 200.0, 8: 450.0, 64: 700.0},
    "schedule": {1: 1.0, 8: 1.0, 64: 1.0},
    "tree": {1: 1.0, 8: 1.0, 64: 1.0},
    "ngram": {1: 900.0, 8: 900.0, 64: 1200.0},
}
ARMS = {
    "none": None,
    "k2": K2,
    "k4": K4,
    "schedule": K4 | {"num_speculative_tokens_per_batch_size": [[1, 8, 4], [9, 64, 0]]},
    "confident": K4 | {"draft_confidence_threshold": 0.3},
    "tree": OURS | {"tree_nodes": 16},
    "ngram": {"method": "ngram", "num_speculative_tokens": 4},
}


def bench(arms: dict[str, Any] = ARMS, **speeds: dict[int, float]) -> dict[str, Any]:
    about = {"target": "TARGET", "head": "HEAD", "versions": {}, "hardware": {}, "rounds": 2}
    lines = [
        {
            "arm": arm,
            "concurrency": size,
            "tokens_per_second": speed,
            "ratio_to_none": speed / SPEEDS["none"][size],
            "tokens_per_step": {"k2": 2.3, "k4": 2.9}.get(arm, 1.0),
            "draft_ms": 1.5,
        }
        for arm, by_size in (SPEEDS | speeds).items()
        for size, speed in by_size.items()
    ]
    return {"about": about | {"arms": arms}, "lines": lines}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_arm_that_was_fastest_at_each_size(tmp_path: Path) -> None:
    file, out = written(tmp_path / "bench.json", bench()), tmp_path / "plan.json"
    assert main(["plan", "HEAD", "--bench", str(file), "--json", str(out)]) == 0
    plan = read_plan(out)
    assert (plan.count_at(1), plan.count_at(8)) == (4, 2)
    assert plan.count_at(64) == 0  # 1% is no gain
    assert [row.count for row in plan.rows if row.batch == 8] == [0, 2, 4]
    assert plan.predicted(8, 2) == pytest.approx(500 / 400)
    assert plan.predicted(64, 0) == 1.0
    assert json.loads(out.read_text())["speculative_config"]["num_speculative_tokens"] == 4


def test_trees_by_the_rows_that_were_measured(tmp_path: Path) -> None:
    counts = {
        f"K={k}": {"tokens_per_step": gain, "acceptance_per_position": []}
        for k, gain in ((2, 2.3), (4, 2.9))
    }
    group = {"temperature": 0.0, "all": {"head": counts}, "trees": {"n=15": {"tokens_per_step": 4}}}
    evaluation = written(tmp_path / "eval.json", {"offline": {"greedy": group}})
    file, out = written(tmp_path / "bench.json", bench()), tmp_path / "plan.json"
    given = ["--bench", str(file), "--eval", str(evaluation), "--json", str(out)]
    assert main(["plan", "HEAD", *given]) == 0
    (trees,) = read_plan(out).trees
    at = {(row.batch, row.count): row for row in trees.rows}
    # 16 rows lie between the 8 and the 24 of 8 requests with K = 0 and 2.
    steps = [at[8, count].step - at[8, count].draft for count in (0, 2)]
    assert at[1, 15].step - at[1, 15].draft == pytest.approx(sum(steps) / 2)
    assert at[64, 15].ratio < at[64, 4].ratio


def test_an_arm_that_never_drafts_is_what_nothing_costs(tmp_path: Path) -> None:
    never = K2 | {"num_speculative_tokens_per_batch_size": [[1, 64, 0]]}
    content = bench(ARMS | {"zero": never}, zero={1: 90.0, 8: 390.0, 64: 960.0})
    rows, _ = rows_from_bench(written(tmp_path / "bench.json", content))
    assert {row.batch: row.ratio for row in rows if row.count == 0} == pytest.approx(
        {1: 0.9, 8: 0.975, 64: 0.96}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected the bench.json"),
        ({"about": {}}, "expected the bench.json"),
        (bench({"none": None, "ngram": ARMS["ngram"]}), "no arm with one number of SpecFormer"),
        (bench(k2={1: 160.0}), "k2 not measured at concurrency 8"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(SpecFormerError, match=message):
        rows_from_bench(written(tmp_path / "bench.json", content))


def test_costs_come_from_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "bench.json", bench())
    assert main(["plan", "HEAD", "--bench", str(file), "--chip", "h200"]) == 2
    assert "--bench: holds the costs already; leave --chip out" in capsys.readouterr().err
