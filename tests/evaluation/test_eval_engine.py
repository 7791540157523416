"""`specformer eval --serve` with real vLLM engines on the bundled pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.paths import HEAD, PROMPTS, ROOT, TARGET
from vllm_specformer.cli.main import main
from vllm_specformer.serving import engine_process

ENGINE_ARGS = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("OMP_NUM_THREADS", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)


def evaluate(out: Path, prompts: int, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and metrics."""
    what = [str(HEAD), "--target", str(TARGET), "--prompts", str(PROMPTS)]
    limits = ["--max-prompts", str(prompts), "--max-tokens", "32", "--dtype", "float32"]
    engine = ["--serve", "--engine-args", json.dumps(ENGINE_ARGS), "--device", "cpu"]
    code = main(["eval", *what, *limits, *engine, *more, "--json", str(out)])
    return code, json.loads(out.read_text())


def test_replay_and_engine_agree(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Step by step, greedy and sampled; vLLM's own counters speak of the same steps."""
    code, metrics = evaluate(
        tmp_path / "eval.json", 16, "--num-speculative-tokens", "4", "--temperature", "0", "1"
    )
    assert code == 0
    greedy, sampled = metrics["engine"]
    assert (greedy["temperature"], sampled["temperature"]) == (0, 1)
    for row in metrics["engine"]:
        # In fp32 two logits that all but tie may change places, rarely.
        assert row["same_steps"] >= 0.99
        assert abs(row["difference"]) <= 0.01
        assert row["engine"]["tokens"] == row["offline"]["tokens"]
        # A bonus token that ends an answer is a step of ours without drafts, and none of vLLM's.
        drafts = row["counters"]["spec_decode_num_drafts"]
        assert 0 <= row["engine"]["steps"] - drafts <= row["answers"]
        accepted = row["counters"]["spec_decode_num_accepted_tokens"]
        ours = row["engine"]["tokens"] - row["engine"]["steps"]
        assert 0 <= accepted - ours <= 4 * row["answers"]
    assert greedy["greedy_tokens_of_the_offline_target"] >= 0.99
    assert greedy["engine"]["tokens_per_step"] > sampled["engine"]["tokens_per_step"] > 1.1
    assert list(metrics["offline"]) == ["greedy", "temperature_1"]
    assert "agrees" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "agrees", "cause"),
    [
        # This head hardly minds: fewer than 2% of the tokens per step, but its steps show it.
        ("norm", True, "most likely: the last hook is taken behind the final norm"),
        ("hooks", False, "most likely: the hooks are taken one layer earlier"),
    ],
)
def test_a_mistake_in_the_engine_is_caught(
    mistake: str,
    agrees: bool,
    cause: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(engine_process, "WORKER", "tests.support.wrong_worker")
    monkeypatch.setenv("MISTAKE", mistake)
    code, metrics = evaluate(tmp_path / "eval.json", 32, "--num-speculative-tokens", "4")
    (row,) = metrics["engine"]
    assert row["same_steps"] < 0.99
    assert (code, row["agrees"]) == (0 if agrees else 1, agrees)
    assert cause in row["causes"][0]
    printed = " ".join(capfd.readouterr().out.split())
    assert cause in printed
    assert ("DISAGREES" in printed) != agrees
