"""The demo's helpers, without vLLM; the demo itself, end to end, is the slow test at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="extra [bench]")
pytest.importorskip("rich", reason="extra [bench]")

import demo
import load

from support.paths import ROOT
from vllm_specformer.serving.counts import DraftCounts


def rounds_of(seconds: float, tokens: tuple[int, ...] = (1, 2, 3)) -> load.Round:
    return load.Round(seconds, (load.Completion("def f():", " pass", tokens),))


def measured(pairs: load.PairedRounds, accepted: tuple[int, ...]) -> demo.Measured:
    """Rounds in which ten steps drafted four tokens each."""
    return demo.Measured(pairs, DraftCounts(10, 40, sum(accepted), accepted))


def test_in_pairs_alternates_who_goes_first() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> Callable[[], load.Round]:
        def run() -> load.Round:
            order.append(name)
            return rounds_of(seconds)

        return run

    pairs = load.in_pairs(side("with", 1.0), side("without", 2.0), rounds=3)
    assert order == ["with", "without", "without", "with", "with", "without"]
    assert pairs.ratios == pytest.approx([2.0, 2.0, 2.0])
    assert pairs.tokens_per_second == pytest.approx((3.0, 1.5))
    assert pairs.differing_prompts() == []


def test_differing_outputs_are_found() -> None:
    pairs = load.PairedRounds((rounds_of(1.0),), (rounds_of(1.0, (1, 2, 4)),))
    assert pairs.differing_prompts() == ["def f():"]


def test_results_have_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = load.PairedRounds((rounds_of(1.0),), (rounds_of(1.8),))
    slower = load.PairedRounds((rounds_of(1.0),), (rounds_of(1.25),))
    pair = demo.PAIRS["bundled"]
    greedy = measured(pairs, (9, 5, 2, 1)), measured(slower, (8, 5, 2, 1))
    results = demo.as_results(pair, greedy)
    assert json.loads(json.dumps(results)) == results
    assert (results["tokens_per_step"], results["tokens_per_step_16"]) == (2.7, 2.6)
    assert results["acceptance_per_position"] == [0.9, 0.5, 0.2, 0.1]
    assert results["tokens_per_second_with"] == 3.0
    assert results["tokens_per_second_without"] == pytest.approx(1.7, abs=0.05)
    assert (results["ratio"], results["ratio_16"]) == (1.8, 1.25)
    assert results["identical_greedy_outputs"] is True
    drawn = measured(slower, (7, 3, 1, 1)), measured(pairs, (7, 3, 1, 1))
    sampled = demo.sampled_results(pair, drawn)
    assert not sampled.keys() & results.keys()
    assert sampled["tokens_per_step_temperature_1"] == 2.2
    assert sampled["acceptance_per_position_temperature_1"] == [0.7, 0.3, 0.1, 0.1]
    assert sampled["ratio_temperature_1"] == 1.25
    assert sampled["ratio_16_temperature_1"] == 1.8
    demo.print_table(pair, results | sampled, greedy, drawn)
    printed = capsys.readouterr().out
    assert "temperature 1" in printed
    assert "warning" not in printed
    assert "1.25 (1.25-1.25)" in printed


def test_noisy_measurements_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    pair, still = demo.PAIRS["smollm2"], rounds_of(1.0)
    quiet = load.PairedRounds((still, still), (rounds_of(1.0), rounds_of(1.4)))
    noisy = load.PairedRounds((still, still), (rounds_of(1.0), rounds_of(1.6)))
    assert not quiet.is_noisy
    assert noisy.is_noisy
    calm, busy = (measured(pairs, (9, 5, 2, 1)) for pairs in (quiet, noisy))
    results = demo.as_results(pair, (calm, busy)) | demo.sampled_results(pair, (calm, calm))
    assert results["ratio_4_temperature_0.7"] == results["ratio"]
    demo.print_table(pair, results, (calm, busy), (calm, calm))
    assert "warning: pairs of rounds differ by more than half" in capsys.readouterr().out


def test_several_requests_may_get_fewer_drafts() -> None:
    chat, code = (demo.PAIRS[name].speculative_config for name in ("smollm2", "bundled"))
    ranges = chat["num_speculative_tokens_per_batch_size"]
    assert ranges == [[1, 1, chat["num_speculative_tokens"]], [2, 4, 1]]
    assert "num_speculative_tokens_per_batch_size" not in code


def test_a_busy_machine_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for load_of_machine, warned in ((1.0, False), (3.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load_of_machine: (load, 0.0, 0.0))
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        demo.warn_if_busy()
        assert ("warning: the machine is busy" in capsys.readouterr().out) is warned


def test_recorded_command_names_no_path_of_this_machine() -> None:
    assert demo.without_machine_paths("/some/where/bin/python a.py --x 1") == "python a.py --x 1"
    assert demo.without_machine_paths(".venv/bin/python a.py") == ".venv/bin/python a.py"


def test_prompts_are_distinct_and_enough() -> None:
    for pair in demo.PAIRS.values():
        prompts = load.read_prompts(demo.PROMPTS / pair.questions)
        assert len(prompts) == len(set(prompts)) >= max(pair.prompts, 2 * pair.together)
        if not pair.chat:
            assert all(p.startswith("def ") and p.endswith('"""') for p in prompts)


@pytest.mark.slow
def test_demo_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    small = [
        "--rounds",
        "1",
        "--prompts",
        "16",
        "--sequential-prompts",
        "2",
        "--out",
        str(out),
        "--pair",
        "bundled",
    ]
    finished = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "server" / "demo.py"), *small],
        cwd=ROOT,
        env=os.environ | {"CI": "true"},
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0
    results = json.loads(out.read_text())
    assert results["identical_greedy_outputs"] is True
    assert results["tokens_per_step"] >= 1
    assert len(results["acceptance_per_position"]) == 4
    assert len(results["commands"]) == 2
    assert results["tokens_per_step_temperature_1"] > 1.7, "drawn drafts are the default"
    assert results["ratio_16_temperature_1"] > 0
