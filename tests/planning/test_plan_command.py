"""`specformer plan`: on paper in full; measuring with one real engine, in full when slow."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.file_limits import file_limit
from support.paths import HEAD, ROOT, TARGET
from vllm_specformer.bench.enlarge import HeavyPair, enlarge
from vllm_specformer.cli.main import main
from vllm_specformer.engine.patches.measuring import listing_schedule
from vllm_specformer.planning.measure import Machine, Settings
from vllm_specformer.planning.plan_file import read_plan
from vllm_specformer.serving.engine_process import EngineProcess

PROMPTS = ROOT / "examples" / "server" / "prompts.jsonl"
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 128 << 20,
}
COUNTS = [0, 2, 4]
TIMES, ACCEPTED = (f"vllm_specformer.planning.timing:{name}" for name in ("times", "accepted"))
TEXTS, ANSWER = 6, 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> HeavyPair:
    return enlarge(TARGET, HEAD, tmp_path_factory.mktemp("heavy"), 30_000_000, 8)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = PROMPTS.read_text().splitlines()[:TEXTS]
    return [list(tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in lines]


@pytest.fixture(scope="module")
def engine(pair: HeavyPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    speculative = {
        "method": "specformer",
        "model": str(pair.head),
        "num_speculative_tokens": max(COUNTS),
        "num_speculative_tokens_per_batch_size": listing_schedule(COUNTS),
    }
    arguments = ENGINE | {
        "model": str(pair.target),
        "speculative_config": speculative,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    with EngineProcess(arguments, tmp_path_factory.mktemp("engine") / "log") as process:
        yield process


def test_the_enlarged_target_answers_as_the_small_one(
    engine: EngineProcess, prompts: list[list[int]]
) -> None:
    """The real engine, drafting for the heavy target, against the small one without any of it."""
    answered = engine.call(ACCEPTED, prompts=prompts, count=4, max_tokens=ANSWER)
    small = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    for ids, answer in zip(prompts, answered["answers"], strict=True):
        text = small.generate(torch.tensor([ids]), max_new_tokens=ANSWER, do_sample=False)
        assert text[0, len(ids) :].tolist() == answer
    assert answered["tokens_per_step"] > 1.8  # as the head has it for its own target
    nothing = engine.call(ACCEPTED, prompts=prompts, count=0, max_tokens=ANSWER)
    assert nothing == {"tokens_per_step": 1.0, "answers": answered["answers"]}


def test_steps_are_timed_at_every_count(engine: EngineProcess, prompts: list[list[int]]) -> None:
    found = engine.call(TIMES, prompts=prompts, counts=COUNTS, steps=5, seconds=60.0)
    assert {int(count): len(times) for count, times in found["steps"].items()} == {
        count: 5 for count in COUNTS
    }
    assert found["prompt"] > 0
    for count, times in found["steps"].items():
        assert 0 < found["drafts"][count] < statistics.mean(times)
    # Storing K/V is a part of drafting.
    assert found["drafts"]["0"] < found["drafts"]["4"]
    short = engine.call(TIMES, prompts=prompts, counts=[2], steps=50, seconds=0.0)
    assert len(short["steps"]["2"]) == 2


def test_short_steps_are_visited_until_they_are_long_enough(
    engine: EngineProcess, pair: HeavyPair, prompts: list[list[int]], tmp_path: Path
) -> None:
    for least, visits in ((0.0, 1), (60.0, 12)):
        settings = Settings([1], [0, 4], cycles=1, steps=2, least_seconds=least)
        machine = Machine({}, pair.head, prompts, settings, tmp_path, lambda line: None)
        machine._cycles({"head": engine})
        timed = {key: [len(times) for times in by] for key, by in machine._steps.items()}
        assert timed == {("head", 1, 0): [2] * visits, ("head", 1, 4): [2] * visits}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    shares = [0.75, 0.5, 0.33, 0.2, 0.1, 0.06, 0.04, 0.03]
    counts = {"K=8": {"tokens_per_step": 3.0, "acceptance_per_position": shares}}
    greedy = {"temperature": 0.0, "all": {"head": counts}}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"offline": {"greedy": greedy}}))
    return path


def test_a_plan_on_paper(
    evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    command = ["plan", HEAD, "--target", TARGET, "--chip", "h200", "--eval", evaluation]
    assert main([str(part) for part in (*command, "--json", out, "--plot", picture)]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200 SXM" in printed
    plan = read_plan(out)
    assert plan.count_at(1) > 0
    # The head is a third of so small a target, and has to be read in every step too.
    assert 1.5 < (plan.predicted(1, 4) or 0) < 1 + 0.75 + 0.5 + 0.33 + 0.2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (plan.trees, plan.tree_config("HEAD")) == ([], None)


def test_a_plan_on_paper_with_trees(
    evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(evaluation.read_bytes())
    nodes = {f"n={n}": {"tokens_per_step": gain} for n, gain in ((8, 3.4), (32, 4.1))}
    content["offline"]["greedy"]["trees"] = nodes
    evaluation.write_text(json.dumps(content))
    out = tmp_path / "plan.json"
    command = ["plan", HEAD, "--target", TARGET, "--chip", "h200", "--eval", evaluation]
    sizes = ["--batch", "1", "512", "--json", out]
    assert main([str(part) for part in (*command, *sizes)]) == 0
    config = json.loads(out.read_bytes())["tree_config"]
    assert config["tree_nodes"] == 32
    ranges = config["tree_nodes_per_batch_size"]
    assert (ranges[0][2], ranges[-1][1]) == (32, 512)
    assert ranges[-1][2] < 32
    assert json.dumps(ranges) in capsys.readouterr().out
    (trees,) = read_plan(out).trees
    # A tree's draft has the Markov term of every node with children.
    at = {row.count: row for row in trees.rows if row.batch == 512}
    assert at[8].draft > {row.count: row for row in trees.chains if row.batch == 512}[8].draft
    assert at[32].step > at[8].step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num-speculative-tokens", "9"], "--num-speculative-tokens 9: this head drafts 1 to 8"),
        (["--chip", "v100", "--eval", "EVAL"], "--chip v100: unknown; choose one of a100"),
        (["--chip", "h200"], "--chip: needs --eval or --accepted"),
        (["--chip", "h200", "--accepted", "0.5", "0.6"], "no later position can be reached more"),
        (["--chip", "h200", "--accepted", "0.5", "0.4"], "--accepted: has 2 positions"),
        (["--chip", "h200", "--target", "/nowhere"], "target /nowhere: neither a directory"),
        ([], "--prompts: needed to measure with"),
        (["--temperature", "0.7"], "--temperature 0.7: chooses among the answers of --eval"),
        (["--engine-args", '{"model": "x"}'], "--engine-args: 'model' is set by the plan"),
        (["--json", "/nowhere/plan.json"], "no such directory as /nowhere"),
        (["--json", "/tmp"], "/tmp: a directory; name a file"),
    ],
)
def test_what_cannot_be_planned_is_refused_at_once(
    changes: list[str], message: str, evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(evaluation) if part == "EVAL" else part for part in changes]
    target = [] if "--target" in given else ["--target", str(TARGET)]
    assert main(["plan", str(HEAD), *target, *given]) == 2
    assert message in capsys.readouterr().err


def test_a_read_only_place_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    plot = tmp_path / "plan.png"
    assert main(["plan", str(HEAD), "--target", str(TARGET), "--plot", str(plot)]) == 2
    assert f"{plot}: {tmp_path} cannot be written to; choose another" in capsys.readouterr().err


def test_a_plan_that_cannot_be_written_is_printed(
    evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", HEAD, "--target", TARGET, "--chip", "h200", "--eval", evaluation]
    line = [str(part) for part in (*command, "--json", out)]
    with file_limit(100):
        assert main(line) == 2
    printed = capsys.readouterr()
    assert f"specformer plan: {out}: File too large while writing" in printed.err
    assert "size of files (`ulimit -f`). Its content is printed above" in printed.err
    assert "Traceback" not in printed.err
    assert not out.exists()
    assert main(line) == 0
    assert json.loads(printed.out[printed.out.index("\n{") :]) == json.loads(out.read_bytes())


def test_a_plan_on_paper_needs_no_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3-8B's shape from its config.json alone, with a head as `train` would make it."""
    model = tmp_path / "config.json"
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    model.write_text(json.dumps({"model_type": "qwen3"} | sizes))
    shares = ["--accepted", "0.7", "0.5", "0.3", "0.2"]
    where = ["--chip", "h200", "--batch", "1", "256", "--num-speculative-tokens", "4"]
    out = tmp_path / "plan.json"
    command = ["plan", "--target", str(tmp_path), *where, *shares, "--json", str(out)]
    assert main(command) == 0
    assert "--speculative-config" in capsys.readouterr().out
    plan = read_plan(out)
    # One request reads 15.2 GB of target, and for its draft 1.2 GB of lm_head and 0.8 GB of head.
    assert plan.predicted(1, 4) == pytest.approx(2.7 * 15.2 / (15.2 + 1.2 + 0.8), rel=0.01)
    assert (plan.predicted(256, 4) or 0) < 1.3
    assert main(["plan", *where, *shares]) == 2
    assert "needs HEAD or --target" in capsys.readouterr().err
    assert main(["plan", "--prompts", str(PROMPTS)]) == 2
    assert "HEAD: needed to measure with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_by_measuring(pair: HeavyPair, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    small = ["--batch", "1", "4", "--num-speculative-tokens", "2", "4", "--cycles", "1"]
    texts = ["--prompts", str(PROMPTS), "--max-prompts", "4", "--max-tokens", "16", "--steps", "4"]
    engine: dict[str, Any] = {name: ENGINE[name] for name in ENGINE if name != "max_num_seqs"}
    arguments = [*small, *texts, "--engine-args", json.dumps(engine), "--json", str(out)]
    assert main(["plan", str(pair.head), *arguments]) == 0
    plan = read_plan(out)
    assert [(row.batch, row.count) for row in plan.rows] == [
        (batch, count) for batch in (1, 4) for count in COUNTS
    ]
    for row in plan.rows:
        assert 0 < row.draft < row.step
        assert row.plain > 0
    assert plan.predicted(1, 4) > 1
