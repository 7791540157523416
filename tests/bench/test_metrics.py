"""`specformer bench` without its servers: arms, options, figures, files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.file_limits import file_limit
from support.paths import HEAD, ROOT, TARGET
from vllm_specformer.bench.arms import NONE, Arm, build, default_names
from vllm_specformer.bench.cells import Cell, Cells, Key, make_cell
from vllm_specformer.bench.client import Client, ClientError
from vllm_specformer.bench.compare import Result, client_arguments
from vllm_specformer.bench.metrics import COLUMNS, prediction_error, summarise
from vllm_specformer.bench.report import report
from vllm_specformer.bench.settings import BenchSettings, server_arguments
from vllm_specformer.cli.main import main
from vllm_specformer.data.files import DiskFullError
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.planning.choose import PlanRow
from vllm_specformer.planning.plan_file import Plan
from vllm_specformer.planning.trees import Trees
from vllm_specformer.serving.counts import DraftCounts
from vllm_specformer.shapes import HeadShape, TargetShape

PROMPTS = ROOT / "examples" / "server" / "prompts.jsonl"
SCHEDULE = [[1, 4, 4], [5, 64, 0]]
SHAPE = TargetShape(6, 256, 4, 2, 64, 768, 2048)
K4 = {"method": "specformer", "model": "HEAD", "num_speculative_tokens": 4}


def cell(number: int, arm: str, seconds: float, accepted: int = 0, **changes: Any) -> Cell:
    """100 tokens in 4 answers; with drafts, 40 of them of 4 tokens."""
    drafts = 40 if accepted else 0
    made = Cell(
        round=number,
        concurrency=4,
        arm=arm,
        speculative=K4 if accepted else None,
        requests=4,
        seconds=seconds,
        output_tokens=100,
        tpot_ms=10.0,
        ttft_ms=20.0,
        drafts=drafts,
        drafted=4 * drafts,
        accepted=accepted,
        accepted_at=[accepted // 2, accepted // 4, accepted // 4, 0] if accepted else [],
        draft_seconds=None,
        draft_steps=None,
        lengths=[25, 25, 25, 25],
        texts=["a", "b", "c", "d"],
        load=0.5,
    )
    return replace(made, **changes)


def result(cells: list[Cell], plan: Plan | None = None) -> Result:
    about = {
        "command": "specformer bench HEAD",
        "target": "TARGET",
        "target_parameters": SHAPE.parameters,
        "rounds": 2,
        "order": "one server at a time",
        "hardware": {"cpu": "a CPU", "cores": 2},
        "versions": {"vllm": "0.32.0"},
    }
    return Result(about, cells, SHAPE, HeadShape.default_for(SHAPE), plan)


CELLS = [
    cell(0, NONE, 2.0),
    cell(0, "k4", 1.0, 48),
    cell(1, NONE, 4.0),
    cell(1, "k4", 1.6, 48, texts=["a", "b", "c", "x"]),
]


def test_ratios_are_taken_within_a_round() -> None:
    none, k4 = summarise(result(CELLS))
    assert none["ratio_to_none"] == 1
    assert (k4["ratio_min"], k4["ratio_to_none"], k4["ratio_max"]) == (2.0, 2.25, 2.5)
    assert k4["tokens_per_second"] == pytest.approx((100 + 62.5) / 2, abs=0.1)
    assert k4["same_output"] == pytest.approx((1 + 0.75) / 2)


def test_tokens_per_step_counts_steps_without_drafts() -> None:
    _, k4 = summarise(result(CELLS))
    # 4 of 100 tokens are the prompts' own; 48 came along with the 48 others.
    assert k4["tokens_per_step"] == 2.0
    assert k4["acceptance_length"] == pytest.approx(1 + 48 / 40)
    assert k4["acceptance_per_position"] == [0.6, 0.3, 0.3, 0.0]
    assert k4["accepted_share"] == pytest.approx(48 / 160)
    # A schedule that drafts in few steps only: half the drafts, as many tokens.
    rarely = [CELLS[0], cell(0, "k4", 1.0, 24, drafts=20, drafted=80)]
    assert summarise(result(rarely))[1]["tokens_per_step"] == pytest.approx(96 / 72, abs=1e-3)


def test_the_papers_terms() -> None:
    none, k4 = summarise(result(CELLS))
    head = HeadShape.default_for(SHAPE)
    p = 1 + (head.shared_parameters + 4 * 256**2) / SHAPE.parameters
    assert k4["p"] == pytest.approx(p, abs=1e-4)
    assert k4["r1"] == pytest.approx(2.0 / p, abs=1e-3)
    assert k4["theta"] == pytest.approx(2.0 / 2.25, abs=1e-3)
    assert none["p"] is None


def test_figures_that_cannot_be_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step with drafts cannot be cheaper than one without; a busy machine measures anything."""
    sound = [cell(0, NONE, 2.0), cell(0, "k4", 1.25, 48)]  # theta 2.0 / 1.6
    assert [line["doubt"] for line in summarise(result(sound))] == [[], []]
    report(result(sound), tmp_path)
    assert "measured again" not in capsys.readouterr().out
    busy = [cell(0, NONE, 2.0, load=2.1), cell(0, "k4", 0.9, 48, load=2.0)]
    none, k4 = summarise(result(busy))
    assert (none["doubt"], k4["doubt"]) == (["load"], ["theta"])
    assert none["load"] == 2.1
    report(result(busy), tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Lines with a mark under doubt should be measured again. Theta: below 1, " in printed
    assert "load: when a measurement began, more was running than the machine has" in printed
    assert "| theta |\n" in (tmp_path / "bench.md").read_text()


def test_predictions_stand_beside_what_was_measured() -> None:
    rows = [PlanRow(1, 4, 2.0, 1.0, 1.0, 0.1), PlanRow(8, 4, 2.0, 1.0, 0.8, 0.1)]
    lines = summarise(result(CELLS, Plan([[1, 8, 4]], rows)))
    expected = 2.0 / (1.0 - 0.2 * 3 / 7)
    assert lines[1]["predicted_ratio"] == pytest.approx(expected, abs=1e-3)
    assert prediction_error(lines) == pytest.approx((2.25 - expected) / 2.25, abs=1e-3)
    assert prediction_error(summarise(result(CELLS))) is None


def test_trees_are_predicted_by_their_own_rows() -> None:
    chains = [PlanRow(1, 4, 2.0, 1.0, 1.0, 0.1)]
    rows = [PlanRow(1, 0, 1.0, 1.0, 1.0, 0.1), PlanRow(1, 16, 3.0, 1.0, 1.25, 0.1)]
    config = {"method": "specformer", "model": "HEAD", "tree_nodes": 16}
    tree = cell(0, "tree", 1.0, 60, speculative=config, drafted=16 * 40)
    cells = [CELLS[0], tree]
    plan = Plan([[1, 8, 4]], chains, trees=[Trees(0.0, chains, rows)])
    expected = summarise(result(cells, plan))[1]["predicted_ratio"]
    assert expected == pytest.approx(3.0 / 1.25, rel=0.1)  # a whole load, in whole steps
    never = config | {"tree_nodes_per_batch_size": [[1, 8, 0]]}
    without = summarise(result([CELLS[0], replace(tree, speculative=never)], plan))[1]
    assert without["predicted_ratio"] == pytest.approx(1.0)
    (_, line) = summarise(result(cells, Plan([[1, 8, 4]], chains)))
    assert line["predicted_ratio"] is None
    # Drafted from all slots of the head, whatever the nodes.
    head = HeadShape.default_for(SHAPE)
    p = 1 + (head.shared_parameters + head.slots * 256**2) / SHAPE.parameters
    assert line["p"] == pytest.approx(p, abs=1e-4)


def test_files_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PlanRow(1, 4, 2.0, 1.0, 1.0, 0.1)]
    report(result(CELLS, Plan([[1, 8, 4]], rows)), tmp_path)
    printed = capsys.readouterr().out
    assert "2.25" in printed
    assert "differ by 11.1% on average" in printed
    with (tmp_path / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert lines[1]["acceptance_per_position"] == "0.6 0.3 0.3 0.0"
    with (tmp_path / "cells.csv").open() as file:
        assert [line["seconds"] for line in csv.DictReader(file)] == ["2.0", "1.0", "4.0", "1.6"]
    content = json.loads((tmp_path / "bench.json").read_bytes())
    assert content["about"]["prediction_error"] == pytest.approx(0.111, abs=1e-3)
    page = (tmp_path / "bench.md").read_text()
    assert "| 4 | k4 | 81.2 | 2.25 | 2.00-2.50 |" in page
    assert "specformer bench HEAD" in page
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_limit(100), pytest.raises(DiskFullError, match=r"bench\.csv: File too large while"):
        report(result(CELLS), tmp_path)
    assert "2.25" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_client_that_cannot_write_its_result(tmp_path: Path) -> None:
    """What vLLM's client reports, in a process that says just that."""
    path, client = tmp_path / "result.json", Client(tmp_path / "client.log")
    said = "OSError: [Errno 122] Disk quota exceeded: 'result.json'"
    client._process = subprocess.Popen(
        [sys.executable, "-c", f"input(); open({str(path)!r}, 'w').write('half'); print({said!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    message = r"result\.json: Disk quota exceeded; free some space, or have the quota raised$"
    with client._process, pytest.raises(DiskFullError, match=message):
        client.measure([], path)
    assert not path.exists()


def test_cells_are_found_again_unless_the_arm_changed(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    cells.keep(CELLS[1])
    key = Key(0, 4, "k4")
    assert cells.find(key, Arm("k4", K4)) == CELLS[1]
    assert cells.find(key, Arm("k4", K4 | {"num_speculative_tokens": 5})) is None
    assert cells.find(replace(key, round=1), Arm("k4", K4)) is None


def test_a_measurement_with_failed_requests_is_refused() -> None:
    saved = {
        "generated_texts": ["a", ""],
        "errors": ["", "Traceback\nConnectionRefusedError: no"],
        "completed": 1,
        "num_prompts": 2,
    }
    with pytest.raises(ClientError, match=r"1 of 2 requests were answered \(ConnectionRefused"):
        make_cell(Key(0, 4, "k4"), Arm("k4", K4), saved, DraftCounts(), 0.0)


def test_arms() -> None:
    arms = build(["k2", "schedule", "ngram"], "HEAD", 8, SCHEDULE, {"mine": {"method": "x"}})
    assert [arm.name for arm in arms] == [NONE, "k2", "schedule", "ngram", "mine"]
    assert arms[0].speculative is None
    assert build(["again"], "HEAD", 8, None, {}) == [Arm(NONE, None), Arm("again", None)]
    assert arms[1].speculative == K4 | {"num_speculative_tokens": 2}
    assert arms[2].speculative == K4 | {"num_speculative_tokens_per_batch_size": SCHEDULE}
    assert arms[4].speculative == {"method": "x"}
    assert default_names([2, 4], None)[:4] == [NONE, "k2", "k4", "ngram"]
    assert "schedule" in default_names([2], SCHEDULE)
    sure = {"method": "specformer", "draft_confidence_threshold": 0.5}
    assert "confident" in default_names([2], SCHEDULE, sure)
    assert build(["confident"], "HEAD", 8, None, {}, sure)[1] == Arm("confident", sure)
    planned = {"method": "specformer", "tree_nodes": 32, "tree_nodes_per_batch_size": [[1, 8, 32]]}
    assert "tree" in default_names([2], SCHEDULE, None, planned)
    assert "tree" not in default_names([2], SCHEDULE)
    assert build(["tree"], "HEAD", 8, None, {}, None, planned)[1] == Arm("tree", planned)
    unplanned = {"method": "specformer", "model": "HEAD", "tree_nodes": 16}
    assert build(["tree"], "HEAD", 8, None, {})[1] == Arm("tree", unplanned)
    # vLLM wants a K above 0 beside a schedule that never drafts.
    never = build(["schedule"], "HEAD", 8, [[1, 64, 0]], {})[1]
    assert (never.speculative or {})["num_speculative_tokens"] == 1


@pytest.mark.parametrize(
    ("names", "others", "message"),
    [
        (["k9"], {}, "--arms k9: this head drafts 1 to 8 tokens"),
        (
            ["eagle"],
            {},
            "--arms eagle: unknown; choose from none, again, k1 ... k8, schedule, confident, tree",
        ),
        (["schedule"], {}, "--arms schedule: needs --schedule"),
        (["confident"], {}, "--arms confident: needs --schedule"),
        (["k2"], {"k2": {}}, "--speculative-config k2=...: --arms has it already"),
    ],
)
def test_arms_that_cannot_be(names: list[str], others: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecFormerError, match=message):
        build(names, "HEAD", 8, None, others)


def test_options_of_the_server() -> None:
    given = {"dtype": "float32", "enforce-eager": True, "max_model_len": 512, "enable_x": False}
    arguments = server_arguments(given | {"compilation_config": {"mode": 0}}, 16)
    line = " ".join(arguments)
    assert "--dtype float32 --enforce-eager --max-model-len 512 --no-enable-x" in line
    assert '--compilation-config {"mode": 0}' in line
    assert "--max-num-seqs 16 --no-enable-prefix-caching" in line
    with_cache = server_arguments({"enable_prefix_caching": True, "max_num_seqs": 8}, 16)
    assert with_cache[1:] == ["--max-num-seqs", "8", "--enable-prefix-caching"]


def test_requests_of_a_measurement(tmp_path: Path) -> None:
    options = BenchSettings(head=HEAD, out=tmp_path, prompts=(PROMPTS,))
    assert [options.requests(n, 100) for n in (1, 2, 16, 64)] == [8, 8, 64, 100]
    with pytest.raises(SpecFormerError, match="--concurrency 64: needs as many distinct prompts"):
        options.requests(64, 48)
    arguments = client_arguments(options, "TARGET", tmp_path / "p.json", 4, 16, 128)
    assert "--ignore-eos" not in arguments
    longer = options.model_copy(update={"ignore_eos": True})
    assert client_arguments(longer, "TARGET", tmp_path / "p.json", 4, 16, 128)[-1] == "--ignore-eos"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--concurrency", "64"], "--concurrency 64: needs as many distinct prompts"),
        (["--arms", "k9"], "--arms k9: this head drafts 1 to 8"),
        (["--arms", "none", "tree"], "--arms tree: needs vLLM's V2 model runner, and servers here"),
        (["--engine-args", '{"port": 1}'], "--engine-args: 'port' is set by the benchmark"),
        (["--schedule", "/nowhere.json"], "--schedule /nowhere.json: not readable"),
        (["--max-tokens", "5000"], "none of 48 texts has 4 to"),
        (["--speculative-config", "a={}", "--speculative-config", "a={}"], "may be given once"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    tmp_path: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["bench", str(HEAD), "--target", str(TARGET), "--prompts", str(PROMPTS)]
    small = [] if "--concurrency" in changes else ["--concurrency", "1", "4"]
    assert main([*command, "--out", str(out), *small, *changes]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_another_benchmark_in_the_same_place_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({"max_tokens": 64}))
    command = ["bench", str(HEAD), "--target", str(TARGET), "--prompts", str(PROMPTS)]
    assert main([*command, "--out", str(out), "--concurrency", "1"]) == 2
    assert "choose another directory, or remove this one" in capsys.readouterr().err
