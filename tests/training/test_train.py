"""`specformer train` from data to a servable head, on a toy target: what it writes and refuses."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.training_runs import ENVIRONMENT, command, train
from support.training_texts import make_texts, write_distilled
from vllm_specformer.config import read_head_config
from vllm_specformer.data.files import sha256_of
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.pairing import check_weights
from vllm_specformer.training import draft_vocabulary, pace, report
from vllm_specformer.training.settings import LEARNING_RATES
from vllm_specformer.training.trainer import HeadTrainer

# Weights are stored in bfloat16, and sums over two processes are rounded in another order.
CLOSE = {"rtol": 0.02, "atol": 2e-3}
RESULT = {
    "README.md",
    "config.json",
    "log.csv",
    "log.jsonl",
    "model.safetensors",
    "provenance.json",
    "run.json",
    "training.png",
}


@pytest.fixture(scope="module")
def finished(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    train(pair, out)
    return out


# --- what comes out ---


def test_the_result_is_a_head(pair: Path, finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == RESULT
    config = read_head_config(finished)
    assert (config.num_draft_slots, config.markov_rank) == (3, 4)
    assert config.target_name_or_path == str(pair / "target")
    check_weights(finished, config)
    head = SpecFormerHead.from_pretrained(finished)
    assert head.dtype == torch.bfloat16  # the target's
    assert all(parameter.isfinite().all() for parameter in head.parameters())


def test_provenance_says_where_it_came_from(pair: Path, finished: Path) -> None:
    provenance = json.loads((finished / "provenance.json").read_text())
    manifest = json.loads((pair / "data" / "manifest.json").read_text())
    assert provenance["target"]["fingerprint"] == manifest["target"]["fingerprint"]
    assert provenance["settings"]["max_steps"] == provenance["result"]["steps"] == 12
    assert provenance["texts"]["trained_on"] + provenance["texts"]["evaluated"] <= 60
    assert provenance["texts"]["evaluated_greedy"] is True
    assert provenance["result"]["weights"]["sha256"] == sha256_of(finished / "model.safetensors")
    assert {"torch", "transformers", "vllm-specformer"} <= provenance["versions"].keys()
    assert provenance["packed"] is True


def test_paths_are_written_so_that_they_hold_anywhere(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair)
    provenance = train(Path("."), tmp_path / "out", **{"max-steps": 1})
    assert read_head_config(tmp_path / "out").target_name_or_path == str(pair / "target")
    assert provenance["target"]["name_or_path"] == str(pair / "target")
    assert provenance["settings"]["data"] == [str(pair / "data")]


def test_log_table_and_card_agree(finished: Path) -> None:
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [2, 3, 4, 6, 8, 9, 10, 12]
    evaluated = [row for row in log if "eval_tokens_per_step" in row]
    assert [row["step"] for row in evaluated] == [4, 8, 12]
    for row in evaluated:
        assert len(row["eval_acceptance_per_position"]) == len(row["eval_slot_losses"]) == 3
        assert 1.0 <= row["eval_tokens_per_step"] <= 4.0
    with (finished / "log.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(line["step"]) for line in table] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert float(table[2]["eval_tokens_per_step_by_drafts_3"]) >= 1.0
    assert float(table[0]["slot_losses_0"]) > 0
    best = json.loads((finished / "provenance.json").read_text())["result"]["evaluation"]
    assert best["tokens_per_step"] == max(row["eval_tokens_per_step"] for row in evaluated)
    card = (finished / "README.md").read_text()
    assert f"| 3 | {best['tokens_per_step']:.2f} |" in card
    assert f"the weights of\nstep {best['step']}." in card
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_head(pair: Path, finished: Path, tmp_path: Path) -> None:
    again = train(pair, tmp_path / "again")
    other = train(pair, tmp_path / "other", seed=1)
    first = json.loads((finished / "provenance.json").read_text())["result"]["weights"]
    assert again["result"]["weights"] == first
    assert other["result"]["weights"]["sha256_of_last_step"] != first["sha256_of_last_step"]


def test_a_training_begins_with_another_head(pair: Path, finished: Path, tmp_path: Path) -> None:
    """Its weights, shape and draft vocabulary, told by nothing but --init.

    A window may be new, and gates, which begin at 1.
    """
    begun, out = tmp_path / "begun", tmp_path / "out"
    train(pair, begun, draft_vocab=20, max_steps=4, markov_gate=False)
    still: dict[str, Any] = {"learning_rate": 1e-12, "max_steps": 1, "slots": None}
    still |= {"context_window": 8, "markov_gate": True}
    provenance = train(pair, out, init=begun, markov_rank=None, seed=5, **still)
    windows = [read_head_config(head).context_window for head in (begun, out)]
    assert windows == [0, 8]
    assert provenance["settings"]["init"] == str(begun)
    expected = load_file(begun / "model.safetensors")
    assert expected["markov_lm_head.weight"].any()
    found = load_file(out / "model.safetensors")
    assert found.pop("markov_gate.weight").abs().max() < 1e-9
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "paper", "optimizer": "adamw", "markov_rank": None},
        {"kl_weight": 0.5, "slot_weights": "1,0.5,0.1", "anchors_per_text": "all"},
        {"batch_size": 5, "max_steps": None, "epochs": 1, "scheduler": "cosine"},
        {"dtype": "bfloat16", "hooks": "0,1,4", "nested_slots": False, "eval_share": 0},
        {"accumulate": 2, "scheduler": "linear", "max_length": 16, "memory": 1},
        {"scheduler": "constant", "slot_counts": "1,3", "target_name": "somewhere/else"},
        {"slot_layers": 2, "optimizer": "adamw"},
        {"draft_vocab": 20, "kl_weight": 0.5},
        {"sample_vocab": 16, "kl_weight": 0.3, "tv_weight": 0.3},
        {"lk_weight": 0.9, "slot_weights": "reach"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_settings(pair: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    provenance = train(pair, tmp_path / "out", **changes)
    config = read_head_config(tmp_path / "out")
    check_weights(tmp_path / "out", config)
    assert config.use_bonus_embedding is (changes.get("preset") != "paper")
    if "hooks" in changes:
        assert config.aux_hidden_state_layer_ids == [0, 1, 4]
    assert config.num_slot_layers == changes.get("slot_layers", 1)
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert ("2 slot layers" in card) is ("slot_layers" in changes)
    assert config.draft_vocab_size == changes.get("draft_vocab", 0)
    assert ("a draft vocabulary of 20 of" in card) is ("draft_vocab" in changes)
    if "eval_share" in changes:
        assert provenance["result"]["evaluation"] is None
    if "target_name" in changes:
        assert config.target_name_or_path == "somewhere/else"


def test_several_directories_are_one_set_of_texts(
    pair: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_distilled(tmp_path / "more", make_texts(30, 40, seed=1), pair / "target")
    provenance = train(pair, tmp_path / "out", data=(pair / "data", tmp_path / "more"))
    assert "90 conversations: " in capsys.readouterr().out
    one = json.loads((finished / "provenance.json").read_text())
    assert provenance["data"]["conversations"] == 90
    assert provenance["data"]["answer_tokens"] > one["data"]["answer_tokens"]
    assert provenance["data"]["manifests"][0] == one["data"]["manifest_sha256"]
    assert len(provenance["data"]["manifests"]) == 2
    assert provenance["settings"]["data"] == [str(pair / "data"), str(tmp_path / "more")]
    assert provenance["result"]["weights"] != one["result"]["weights"]


def test_few_steps_are_told(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a few answers in large batches, and how many epochs would do."""
    train(pair, tmp_path / "few", max_steps=None, epochs=1, batch_tokens=2048)
    (told,) = [row for row in capsys.readouterr().out.splitlines() if "so few steps" in row]
    steps = json.loads((tmp_path / "few" / "provenance.json").read_text())["result"]["steps"]
    assert f"--epochs {-(-300 // steps)} makes 300 of them" in told
    train(pair, tmp_path / "asked", max_steps=2)
    assert "so few steps" not in capsys.readouterr().out


@pytest.mark.parametrize("able", [True, False])
def test_arithmetic_of_a_cpu(
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    able: bool,
) -> None:
    """bfloat16 where the processor has it; a run says so where it only emulates it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    options = {"dtype": "auto", "device": "cpu", "max_steps": 2, "eval_share": 0}
    provenance = train(pair, tmp_path / "out", **options)
    assert provenance["dtype"] == ("bfloat16" if able else "float32")
    assert provenance["settings"]["anchors_per_text"] == 128
    assert "only emulates" not in capsys.readouterr().out
    provenance = train(pair, tmp_path / "asked", **options | {"dtype": "bfloat16"})
    assert provenance["dtype"] == "bfloat16"
    assert ("only emulates" in capsys.readouterr().out) is not able


def test_evaluations_take_a_tenth_at_most(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer texts are evaluated where more would take longer; a number that is given counts."""
    options = {"eval_share": 0.5, "batch_size": 1, "max_steps": 20, "eval_every": None}
    fewer = train(pair, tmp_path / "fewer", **options)
    assert fewer["texts"]["evaluated"] == 1
    given = train(pair, tmp_path / "given", eval_texts=7, **options)
    assert given["texts"]["evaluated"] == 7


def test_an_evaluation_announces_itself(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(pair, tmp_path / "out", eval_texts=2)
    shown = capsys.readouterr()
    assert "evaluating 2 held-out texts: " in shown.err
    assert "step 4: tokens per step" in shown.out


def test_a_forecast_after_a_minute(
    pair: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "FORECAST_AFTER", 0.0)
    train(pair, tmp_path / "out")
    told = [line for line in capsys.readouterr().out.splitlines() if "forecast: " in line]
    assert len(told) == 1
    assert "forecast: 10 steps to go at " in told[0]
    monkeypatch.setattr(report, "FORECAST_AFTER", 60.0)
    train(pair, tmp_path / "short")
    assert "forecast: " not in capsys.readouterr().out


def test_a_draft_vocabulary_is_proposed_where_scoring_dominates(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(pair, tmp_path / "none", max_steps=1)
    assert "--draft-vocab" not in capsys.readouterr().out  # a vocabulary of 40
    monkeypatch.setattr(draft_vocabulary, "DOMINANT", 0.0)
    monkeypatch.setattr(draft_vocabulary, "ENOUGH", 0.3)
    train(pair, tmp_path / "some", max_steps=1)
    printed = capsys.readouterr().out
    assert "note: scoring all 40 tokens is 23% of a slot's work; --draft-vocab 16 would" in printed
    train(pair, tmp_path / "given", max_steps=1, draft_vocab=20)
    assert "note: scoring" not in capsys.readouterr().out


def test_a_limit_on_the_hours_ends_the_run_in_time(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock on which every step takes a minute."""
    clock = [0.0]
    real = HeadTrainer.training_step

    def step(*args: Any, **kwargs: Any) -> Any:
        clock[0] += 60
        return real(*args, **kwargs)

    monkeypatch.setattr(HeadTrainer, "training_step", step)
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    options = {"max_steps": 40, "eval_every": None, "save_every": None, "log_every": 1}
    provenance = train(pair, tmp_path / "out", max_hours=0.25, **options)
    assert "15/15 [" in capsys.readouterr().err  # the bar's end
    result = provenance["result"]
    assert (result["steps"], result["planned_steps"]) == (15, 40)
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    highest = LEARNING_RATES["muon"]
    assert rates[6] == highest  # the first half of the time
    # A step's rate is that of the time before it.
    for step in (11, 14):
        expected = highest * pace.factor("trapezoid", step / 15, 0.05)
        assert rates[step] == pytest.approx(expected, abs=1e-4)
    assert rates[14] < 0.001
    assert [row["hours"] for row in rows if "loss" in row][-1] == pytest.approx(0.25)
    # On this clock an evaluation takes no time, so each tenth has one.
    assert [r["step"] for r in rows if "eval_tokens_per_step" in r] == [
        2,
        3,
        5,
        6,
        8,
        9,
        11,
        12,
        14,
        15,
    ]
    assert "15 of 40 planned (as many as fitted into 0.25 hours)" in " ".join(
        (tmp_path / "out" / "README.md").read_text().split()
    )


def test_targets_that_cannot_pack_are_padded(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_specformer.training.states.can_pack", lambda target: False)
    provenance = train(pair, tmp_path / "out")
    assert provenance["packed"] is False
    assert "does not keep texts apart that share a row" in capsys.readouterr().out


def torchrun(line: list[str]) -> None:
    """The command in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = ["-m", "vllm_specformer.cli.main", *line]
    subprocess.run([sys.executable, *launcher, *module], check=True, env=ENVIRONMENT)


def test_processes_end_together_when_the_time_is_up(pair: Path, tmp_path: Path) -> None:
    """By the real clock, of which each process has its own: without one number they would hang."""
    options = {"device": "cpu", "max_steps": 100_000, "eval_every": None, "save_every": None}
    torchrun(command(pair, tmp_path / "out", max_hours=0.001, **options))
    result = json.loads((tmp_path / "out" / "provenance.json").read_text())["result"]
    assert 1 < result["steps"] < 100_000
    assert result["evaluation"]["step"] <= result["steps"]


def test_two_processes_are_one_with_two_batches(pair: Path, tmp_path: Path) -> None:
    """Data parallelism sees the same texts and gives, up to rounding, the same head."""
    options = {"device": "cpu", "scheduler": "constant", "eval_share": 0}
    torchrun(command(pair, tmp_path / "two", **options))
    train(pair, tmp_path / "one", accumulate=2, **options)
    train(pair, tmp_path / "half", **options)
    one, two, half = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "half")
    )
    for name in one:
        torch.testing.assert_close(two[name].float(), one[name].float(), **CLOSE)
    # What the comparison relies on: half of the texts give another head.
    weight = "positional_proj.weight"
    assert not torch.allclose(half[weight].float(), one[weight].float(), **CLOSE)
