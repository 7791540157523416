"""A training that is killed continues and ends as if it had never stopped; nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from support.file_limits import file_limit
from support.paths import HEAD
from support.training_runs import ENVIRONMENT, command, refusal, train
from support.training_texts import make_texts, write_distilled
from vllm_specformer.cli.main import main
from vllm_specformer.config import read_head_config
from vllm_specformer.data.files import directory_lock
from vllm_specformer.pairing import check_weights
from vllm_specformer.training import report, run_directory
from vllm_specformer.training.settings import TrainSettings
from vllm_specformer.training.trainer import HeadTrainer

# Long enough to be killed in the middle of.
LONG = {"max_steps": 60, "save_every": 5, "eval_every": 6, "log_every": 2, "draft_vocab": 20}
CLOCK = ("tokens_per_second", "hours", "eval_hours")
SAME = ("README.md", "config.json", "model.safetensors", "run.json")


def weights(out: Path) -> dict[str, str]:
    return json.loads((out / "provenance.json").read_text())["result"]["weights"]


def log(out: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def assert_same(out: Path, whole: Path) -> None:
    assert weights(out) == weights(whole)
    for name in SAME:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert log(out) == log(whole)
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.fixture(autouse=True, scope="module")
def no_drawing() -> Iterator[None]:
    """Drawing the curves takes as long as everything else in these short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda history: b"")
        yield


@pytest.fixture(scope="module")
def whole(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(pair, out)
    return out


@pytest.fixture(scope="module")
def begun(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that broke off after its first checkpoint; to be copied before use."""
    out = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, HeadTrainer, "_save_checkpoint", 2)
        with pytest.raises(Killed):
            main(command(pair, out))
    return out


class Killed(BaseException):
    """Stands for a kill: nothing may catch it and tidy up."""


def interrupt(patch: pytest.MonkeyPatch, where: Any, name: str, call: int) -> None:
    """Let the `call`-th call of a function kill the run."""
    real: Callable[..., Any] = getattr(where, name)
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*args, **kwargs)

    patch.setattr(where, name, counted)


# --- killed ---


def start(line: list[str]) -> subprocess.Popen[bytes]:
    """The command in a process of its own, where sums are rounded alike: one thread, and none of
    the settings that other tests have left in this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_specformer.cli.main", *line],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def run_until(line: list[str], reached: Callable[[], bool]) -> None:
    """Start the command and kill it as soon as something is there."""
    process = start(line)
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def logged(out: Path, step: int) -> bool:
    path = out / "log.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def test_kill_and_continue(pair: Path, tmp_path: Path) -> None:
    """SIGKILL, twice."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    undisturbed = start(command(pair, whole, **LONG))
    line = command(pair, out, **LONG)
    run_until(line, lambda: (out / "checkpoints" / "checkpoint-10").exists())
    assert not (out / "model.safetensors").exists()
    run_until(line, lambda: logged(out, 26))
    assert start(line).wait() == undisturbed.wait() == 0
    assert_same(out, whole)


@pytest.mark.slow
def test_kill_at_many_moments(pair: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    undisturbed = start(command(pair, whole, **LONG))
    line = command(pair, out, **LONG)
    for step in range(3, 60, 7):
        run_until(line, lambda step=step: logged(out, step - step % 2))
    assert start(line).wait() == undisturbed.wait() == 0
    assert_same(out, whole)


WRITES = [
    *((run_directory.os, "replace", call) for call in (1, 2, 4, 6, 8)),
    (HeadTrainer, "save_head", 2),
    (run_directory.RunDirectory, "publish_checkpoint", 2),
    (run_directory.RunDirectory, "clean_up", 2),
    (run_directory, "_sync", 9),
    (report, "write_log", 1),
    (report, "write_table", 3),
    (report, "model_card", 1),
]


@pytest.mark.parametrize(("where", "name", "call"), WRITES, ids=lambda value: str(value)[:40])
def test_a_kill_between_any_two_writes(
    pair: Path, whole: Path, tmp_path: Path, where: Any, name: str, call: int
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, where, name, call)
        with pytest.raises(Killed):
            main(command(pair, out))
    train(pair, out)
    assert_same(out, whole)


def test_a_complete_run_is_left_alone(
    pair: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}
    assert main(command(pair, whole)) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in whole.iterdir()} == before


# --- refused ---


def test_other_settings_are_refused(
    pair: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(begun, out)
    message = refusal(capsys, command(pair, out, learning_rate=0.01, max_steps=20))
    assert "learning_rate null, now 0.01" in message
    assert "max_steps 12, now 20" in message
    assert "choose another directory" in message
    train(pair, out)  # what it was begun with still continues it


def test_another_head_to_begin_with_is_refused(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It decides the draft vocabulary too; the same head may lie elsewhere by then."""
    starts = [tmp_path / "one", tmp_path / "other"]
    for seed, start in enumerate(starts):
        train(pair, start, max_steps=1, seed=seed, draft_vocab=20)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, HeadTrainer, "_save_checkpoint", 2)
        with pytest.raises(Killed):
            main(command(pair, out, init=starts[0]))
    for init in (starts[1], None):
        assert "was begun with init " in refusal(capsys, command(pair, out, init=init))
    moved = starts[0].rename(tmp_path / "moved")
    assert train(pair, out, init=moved)["settings"]["init"] == str(moved)


def test_a_head_to_begin_with_is_looked_at_first(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    train(pair, start, max_steps=1)
    wrong = {"slots": None, "slot_weights": ",".join("1" * 8)}
    message = refusal(capsys, command(pair, out, init=start, **wrong))
    assert "expected 'decay', 'uniform', 'reach' or 3 numbers" in message
    (start / "model.safetensors").unlink()
    assert "model.safetensors: the file is missing" in refusal(
        capsys, command(pair, out, init=start)
    )


def test_settings_may_change_before_the_first_checkpoint(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, HeadTrainer, "_save_checkpoint", 1)
        with pytest.raises(Killed):
            main(command(pair, out, learning_rate=0.3))
    capsys.readouterr()
    assert train(pair, out, learning_rate=0.01)["settings"]["learning_rate"] == 0.01
    assert (
        f"note: {out} was begun with learning_rate 0.3, now 0.01; it had no checkpoint yet, so "
        "the run begins anew"
    ) in capsys.readouterr().out


def test_a_moved_run_continues(pair: Path, begun: Path, whole: Path, tmp_path: Path) -> None:
    """Paths are no settings."""
    shutil.copytree(pair, tmp_path / "pair")
    shutil.copytree(begun, tmp_path / "out")
    moved = train(tmp_path / "pair", tmp_path / "out")["result"]["weights"]
    assert moved == weights(whole)


def test_two_runs_in_one_directory_are_refused(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    script = (
        "import pathlib, sys, time\n"
        "from vllm_specformer.data.files import directory_lock\n"
        "with directory_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        assert f"{out} is in use by another run (pid {other.pid}" in refusal(
            capsys, command(pair, out)
        )
    finally:
        other.kill()
        other.wait()
    with directory_lock(out):
        pass  # the killed owner keeps nobody out


def test_other_peoples_directories_are_refused(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert "holds 'thesis.tex' but no run.json" in refusal(capsys, command(pair, tmp_path))


def test_answers_of_another_target_are_refused(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_distilled(tmp_path / "data", make_texts(20, 40))  # the bundled target's
    line = command(pair, tmp_path / "out", data=tmp_path / "data")
    assert "learns from its own target's answers only" in refusal(capsys, line)
    assert not (tmp_path / "out").exists()


def test_damaged_and_unfinished_data(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command(pair, tmp_path / "out", data=tmp_path / "data")
    assert "no such file; name a directory that `specformer distill" in refusal(capsys, line)
    shutil.copytree(pair / "data", tmp_path / "data")
    shard = tmp_path / "data" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard}: its sha256 is not the one in manifest.json" in refusal(capsys, line)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["complete"] = False
    del manifest["shards"][1]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert "only 1 of 2 shards are there" in refusal(capsys, line)
    assert train(pair, tmp_path / "out", data=tmp_path / "data", partial_data=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": "many"}, "--slots many: "),
        ({"slots": 65}, "--slots 65: "),
        (
            {"slot_weights": "1,2"},
            "--slot-weights 1,2: expected 'decay', 'uniform', 'reach' or 3 numbers",
        ),
        ({"slot_weights": "0,1,1"}, "the first above 0"),
        ({"slot_counts": "2,4"}, "--slot-counts 2,4: expected numbers from 1 to 3"),
        ({"optimizer": "sgd"}, "--optimizer sgd: Input should be 'muon' or 'adamw'"),
        ({"kl_weight": 2}, "--kl-weight 2: "),
        ({"hooks": "4,0"}, "must be strictly increasing"),
        ({"eval_share": 0.99999}, "leaves none of the 60 texts to train on"),
        ({"kl_weight": 0.6, "tv_weight": 0.5}, "they are shares of one loss, together at most 1"),
        ({"lk_weight": 0.6, "tv_weight": 0.5}, "--lk-weight 0.6: they are shares of one loss"),
        ({"init": "/nowhere"}, "SpecFormer head /nowhere: config.json is missing"),
        ({"init": HEAD}, "python-specformer: its num_draft_slots is 8, 3 was asked for"),
        (
            {"init": HEAD, "slots": None, "markov_rank": None},
            "python-specformer: it is for another target (vocab_size ",
        ),
        ({"device": "cuda"}, "--device cuda: PyTorch sees no GPU"),
        ({"target": "/nowhere"}, "target /nowhere"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_unusable_settings_are_refused(
    pair: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in refusal(capsys, command(pair, tmp_path / "out", **changes))


def test_sharding_is_refused(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    message = refusal(capsys, command(pair, tmp_path / "out"))
    assert "ACCELERATE_USE_FSDP=true: heads are not sharded" in message


# --- failures of the machine and of the training ---


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


FULL = "the disk of {} is full"
QUOTA = "the quota on the disk of {} is used up"
READ_ONLY = "the disk of {} is read-only"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed: No space "
                      "left on device"), FULL),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), QUOTA),
        (SafetensorError("Error while serializing: I/O error: (os error 122)"), QUOTA),
        (RuntimeError("write(): fd 4 failed with Read-only file system"), READ_ONLY),
        (SafetensorError("Error while serializing: I/O error: (os error 30)"), READ_ONLY),
    ],
    ids=["full", "full-torch", "quota", "quota-safetensors", "ro-torch", "ro-safetensors"],
)  # fmt: skip
def test_a_full_disk_leaves_the_last_checkpoint(
    pair: Path,
    begun: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    why: str,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(begun, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadTrainer, "_save_optimizer_and_scheduler", fail_with(error))
        message = refusal(capsys, command(pair, out))
    assert f"{why.format(out)}, the checkpoint of step 6 could not be written" in message
    assert "The last checkpoint, checkpoint-3, is whole." in message
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    train(pair, out)
    assert_same(out, whole)


# Both fail in the same way for the system; PyTorch does not say why ("unexpected pos 576 vs 534").
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_limit_on_files_leaves_the_last_checkpoint(
    pair: Path,
    begun: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(begun, out)
    with file_limit((out / "checkpoints" / "checkpoint-3" / name).stat().st_size - 1):
        message = refusal(capsys, command(pair, out))
    assert f"a file in {out} may not become as large as it has to, the checkpoint of" in message
    assert "The last checkpoint, checkpoint-3, is whole. Raise the limit on the size" in message
    assert "(`ulimit -f`) and give the same command again" in message
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    train(pair, out)
    assert_same(out, whole)


def test_another_error_while_a_checkpoint_is_written_is_passed_on(
    pair: Path, begun: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(begun, out)
    with pytest.MonkeyPatch.context() as patch:
        broken = fail_with(RuntimeError("broken"))
        patch.setattr(HeadTrainer, "_save_optimizer_and_scheduler", broken)
        with pytest.raises(RuntimeError, match="broken"):
            main(command(pair, out))
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_divergence_is_reported(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command(pair, tmp_path / "out", learning_rate=1e30, scheduler="constant", warmup=0)
    assert "the training has diverged; lower --learning-rate" in refusal(capsys, line)


def test_ctrl_c_is_no_traceback(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadTrainer, "training_step", fail_with(KeyboardInterrupt()))
    assert main(command(pair, tmp_path / "out")) == 130
    error = capsys.readouterr().err
    assert "There is no checkpoint yet. Give the same command again, and it begins anew" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """And says what is safe; what is continued gives the same head as an undisturbed run."""
    out = tmp_path / "out"
    real, steps = HeadTrainer.training_step, [0]
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def step(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 5:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadTrainer, "training_step", step)
        assert main(command(pair, out)) == 130
    error = capsys.readouterr().err
    assert "ending with a checkpoint after the step under way" in error
    assert "interrupted. The last checkpoint, checkpoint-5, is whole. Give the same" in error
    assert f"specformer train --finish {out}" in error
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(pair, out)
    undisturbed = train(pair, tmp_path / "whole")
    assert weights(out) == undisturbed["result"]["weights"]


# --- finished early ---


def test_a_head_of_an_interrupted_run(pair: Path, begun: Path, whole: Path, tmp_path: Path) -> None:
    """In another directory, so that the run can be continued all the same."""
    run, out = tmp_path / "run", tmp_path / "head"
    shutil.copytree(begun, run)
    assert main(["train", "--finish", str(run), "--out", str(out)]) == 0
    config = read_head_config(out)
    check_weights(out, config)
    assert config.target_name_or_path == str(pair / "target")
    provenance = json.loads((out / "provenance.json").read_text())
    reference = json.loads((whole / "provenance.json").read_text())
    result = provenance.pop("result")
    assert result["steps"] == 3
    assert result["planned_steps"] == 12
    assert reference.pop("result")["steps"] == 12
    assert provenance == reference
    card = " ".join((out / "README.md").read_text().split())
    assert "3 of 12 planned (the run was ended early)" in card
    saved = load_file(run / "checkpoints" / "checkpoint-3" / "model.safetensors")
    served = load_file(out / "model.safetensors")
    if result["evaluation"] is None:
        for name, value in saved.items():
            assert torch.equal(served[name], value.bfloat16()), name
    train(pair, run)
    assert weights(run) == weights(whole)


def test_a_run_finished_in_its_own_directory_is_complete(
    pair: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    assert main(["train", "--finish", str(run)]) == 0
    assert "holds the head" in capsys.readouterr().out
    assert not (run / "checkpoints").exists()
    assert not (run / "about.json").exists()
    check_weights(run, read_head_config(run))
    assert main(command(pair, run)) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    message = refusal(capsys, ["train", "--finish", str(run)])
    assert "the run is complete; its directory is the head" in message


def test_what_cannot_be_finished(
    pair: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no run.json in it" in refusal(capsys, ["train", "--finish", str(tmp_path)])
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    line = ["train", "--finish", str(run), "--out", str(tmp_path / "taken")]
    assert "is not empty; choose a new directory" in refusal(capsys, line)
    (served,) = run.glob("checkpoints/*/head")
    for lacking in (served, run / "checkpoints"):
        shutil.rmtree(lacking)
        message = refusal(capsys, ["train", "--finish", str(run)])
        assert "it has no checkpoint of this version yet; give the command it was begun" in message


def test_without_finish_target_data_and_out_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--target: needed" in refusal(capsys, ["train", "--data", "d", "--out", "o"])
    assert "--data: needed" in refusal(capsys, ["train", "--target", "t", "--out", "o"])
    assert "--out: needed" in refusal(capsys, ["train", "--target", "t", "--data", "d"])


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for name in TrainSettings.model_fields:
        assert TrainSettings.written(name) in text
