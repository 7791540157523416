"""Whole runs with a made-up engine: what is written, what is refused, what survives."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.distill.fakes import (
    CONTEXT,
    FakeEngine,
    chat,
    mixed_records,
    open_fake,
    options,
    rows_of,
    write_lines,
)
from support.file_limits import file_limit
from support.paths import ROOT
from support.quantised import write_description
from vllm_specformer.data.files import (
    DirectoryInUseError,
    DiskFullError,
    directory_lock,
    partial_path,
)
from vllm_specformer.data.manifest import DistilledDataError, read_manifest
from vllm_specformer.data.prompts import PromptError
from vllm_specformer.distill import distill as run
from vllm_specformer.distill.backend import Progress
from vllm_specformer.distill.dialogue import TOO_LONG, Dialogue
from vllm_specformer.distill.distill import OtherSettingsError, distill, safe
from vllm_specformer.distill.encode import Encoder
from vllm_specformer.distill.progress import ProgressBar
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.target.files import TargetError
from vllm_specformer.target.unsupported import UnsupportedTargetError

COUNT = 23  # six shards, the last one short
KILL_POINTS = "support.distill.kill_points"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", mixed_records(COUNT))


@pytest.fixture(autouse=True)
def _tokenizer_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the tokenizer is most of a run's time here, and tested elsewhere."""
    monkeypatch.setattr(run, "load_encoder", lambda *_, **__: encoder)


def silent(_: str) -> None:
    pass


class StoppingEngine(FakeEngine):
    """Ends with an error after some answers, as a killed process would, but with a traceback."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__(on_answer=self._count)
        self.left = after
        self.error = error

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


def test_a_whole_run(target: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = distill(options(target, prompts, out), open_fake, silent)
    assert manifest == read_manifest(out)
    assert manifest.complete
    assert sorted(os.listdir(out)) == [
        "manifest.json",
        *(f"shard-0000{n}.parquet" for n in range(6)),
    ]
    rows = rows_of(out)
    assert [row.id for row in rows] == list(range(COUNT))
    assert manifest.counts.conversations == COUNT
    assert manifest.counts.tokens == sum(len(row.input_ids) for row in rows)
    assert manifest.counts.sampled == sum(row.temperature > 0 for row in rows) > 0
    assert manifest.context == CONTEXT
    assert manifest.chat_template_sha256 is not None
    assert manifest.versions["engine"] == "fake"


def test_a_complete_directory_starts_no_engine(target: Path, prompts: Path, tmp_path: Path) -> None:
    given = options(target, prompts, tmp_path / "out")
    manifest = distill(given, open_fake, silent)

    def never(*_: Any) -> FakeEngine:
        raise AssertionError("the engine was started")

    assert distill(given, never, silent) == manifest


def test_a_target_no_head_can_be_trained_for_starts_no_engine(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    """An hour of answers would be of no use; what is complete already is left alone."""

    def never(*_: Any) -> FakeEngine:
        raise AssertionError("the engine was started")

    directory = shutil.copytree(target, tmp_path / "target")
    write_description(directory, {"quant_method": "unheard-of"})
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.qweight"] = torch.zeros(1)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedTargetError, match=r"quantised \(unheard-of\).*cannot unpack"):
        distill(options(directory, prompts, tmp_path / "out"), never, silent)
    assert not (tmp_path / "out").exists()


def test_a_target_that_only_vllm_can_run(target: Path, prompts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    directory = shutil.copytree(target, tmp_path / "target")
    write_description(directory, {"quant_method": "unheard-of"})
    distill(options(directory, prompts, tmp_path / "out"), open_fake, said.append)
    assert any("train with --states vllm, which does not unpack weights" in line for line in said)


def test_shards_hold_what_the_input_says_whatever_else_was_distilled(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    distill(options(target, prompts, tmp_path / "a", shard_size=5), open_fake, silent)
    distill(options(target, prompts, tmp_path / "b", shard_size=100), open_fake, silent)
    distill(options(target, prompts, tmp_path / "c", max_prompts=7), open_fake, silent)
    rows = {row.id: row for row in rows_of(tmp_path / "a")}
    assert list(rows.values()) == rows_of(tmp_path / "b")
    drawn = rows_of(tmp_path / "c")
    assert len(drawn) == 7
    assert all(rows[row.id] == row for row in drawn)


@pytest.mark.parametrize(("gpu", "size"), [(False, 128), (True, 1000)])
def test_shards_are_small_where_answers_are_slow(
    target: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    size: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    made = distill(options(target, prompts, tmp_path / "out", shard_size=None), open_fake, silent)
    assert made.shard_size == size


def test_a_run_keeps_the_shard_size_it_was_begun_with(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    given = options(target, prompts, tmp_path / "out", shard_size=7)
    stopping = StoppingEngine(10, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        distill(given, lambda *_: stopping, silent)
    whole = distill(options(target, prompts, tmp_path / "out", shard_size=None), open_fake, silent)
    assert whole.shard_size == 7
    assert whole.complete


def test_speed_and_time_left_are_those_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the last answers, which come in waves."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    bar = ProgressBar(total=1000, done=100)
    bar._bar._time = lambda: clock[0]
    bar._bar.start_t = bar._bar.last_print_t = 0.0
    for answers, seconds in ((10, 100.0), (90, 100.0)):
        clock[0] += seconds
        bar.answered(answers, 0)
    shown = bar._bar.format_dict | {"elapsed": 200.0}
    assert "200/1000 [03:20<26:40,  2.00s/ answers" in bar._bar.format_meter(**shown)
    bar.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("engine died")])
def test_an_interrupted_run_continues(
    target: Path, prompts: Path, tmp_path: Path, error: BaseException
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    distill(options(target, prompts, whole), open_fake, silent)
    given = options(target, prompts, out)
    assert safe(out) == "Nothing was begun; give the same command again."
    for after in (0, 9, 4):
        with pytest.raises(type(error)):
            distill(given, lambda *_, after=after: StoppingEngine(after, error), silent)
    assert not (out / ".lock").exists()
    manifest = read_manifest(out, allow_incomplete=True)
    assert 0 < len(manifest.shards) < 6
    assert f"{len(manifest.shards)} of 6 shards are finished and safe" in safe(out)
    engine = FakeEngine()
    distill(given, lambda *_: engine, silent)
    assert rows_of(out) == rows_of(whole)
    assert len(engine.requests) < read_manifest(whole).counts.answers


def test_a_lost_manifest_is_made_again(target: Path, prompts: Path, tmp_path: Path) -> None:
    given = options(target, prompts, tmp_path / "out")
    manifest = distill(given, open_fake, silent)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "shard-00002.parquet").unlink()
    assert distill(given, open_fake, silent) == manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 17}, "--max-tokens 16, now 17"),
        ({"seed": 3, "top_p": 0.5}, "--top-p 1.0, now 0.5; --seed 0, now 3"),
        ({"temperature": 0.7}, "--temperature 0.0, now 0.7"),
        ({"sampled_share": 0.0}, "--sampled-share 0.25, now 0.0"),
        ({"max_prompts": 5}, "--max-prompts None, now 5; number of prompts 23, now 5"),
        ({"shard_size": 5}, "--shard-size 4, now 5"),
        ({"dtype": "float32"}, "--dtype 'auto', now 'float32'"),
        ({"max_model_len": 50}, "--max-model-len None, now 50"),
        ({"chat_template_args": {"a": 1}}, "--chat-template-args {}, now {'a': 1}"),
        ({"engine": "http://localhost:1"}, "--engine 'offline', now 'server'"),
    ],
)
def test_other_arguments_are_refused(
    target: Path, prompts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        distill(
            options(target, prompts, out),
            lambda *_: StoppingEngine(9, KeyboardInterrupt()),
            silent,
        )
    before = sorted(path.read_bytes() for path in out.iterdir())
    with pytest.raises(OtherSettingsError) as error:
        distill(options(target, prompts, out, **changes), open_fake, silent)
    assert f"was begun with other arguments: {message}" in str(error.value)
    assert "choose another --out" in str(error.value)
    assert sorted(path.read_bytes() for path in out.iterdir()) == before


def test_other_prompts_target_or_context_are_refused(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = options(target, prompts, out)
    with pytest.raises(KeyboardInterrupt):
        distill(given, lambda *_: StoppingEngine(9, KeyboardInterrupt()), silent)
    with pytest.raises(OtherSettingsError, match=r"begun with a context of 96 tokens.* now has 97"):
        distill(given, lambda *_: FakeEngine(97), silent)
    moved = shutil.copytree(target, tmp_path / "moved")
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    with pytest.raises(OtherSettingsError, match=r"--target \(its files\)"):
        distill(options(moved, prompts, out), open_fake, silent)
    renamed = prompts.rename(tmp_path / "renamed.jsonl")
    distill(options(target, renamed, out), open_fake, silent)  # the content counts
    write_lines(renamed, mixed_records(COUNT)[::-1])
    with pytest.raises(OtherSettingsError, match=r"--prompts \(the files' content\)"):
        distill(options(target, renamed, out), open_fake, silent)


def test_two_runs_into_one_directory(target: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import sys, time, pathlib\n"
        "from vllm_specformer.data.files import directory_lock\n"
        "with directory_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(
            DirectoryInUseError, match=f"in use by another run .pid {holder.pid} on"
        ):
            distill(options(target, prompts, out), open_fake, silent)
        holder.kill()
    assert (out / ".lock").exists()  # left by the killed one, and taken over
    assert distill(options(target, prompts, out), open_fake, silent).complete
    assert not (out / ".lock").exists()


def test_a_failed_start_leaves_no_directory(target: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(PromptError, match="No such file"):
        distill(options(target, missing, out), open_fake, silent)
    with pytest.raises(TargetError):
        distill(options(tmp_path / "no" / "model", missing, out), open_fake, silent)
    assert not out.exists()
    blocked = write_lines(tmp_path / "file", [])
    with pytest.raises(SpecFormerError, match=r"cannot be written to .* choose another directory"):
        distill(options(target, missing, blocked), open_fake, silent)
    with directory_lock(out):
        (out / "kept").touch()
    assert out.exists()


def test_a_full_disk(target: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = options(target, prompts, out)

    class Filling(FakeEngine):
        """Lets the third shard's file be one that takes no byte."""

        def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
            super().answer(dialogues, progress)
            if dialogues[0].prompt.id == 8:
                partial_path(out / "shard-00002.parquet").symlink_to("/dev/full")

    with pytest.raises(SpecFormerError) as error:
        distill(given, lambda *_: Filling(), silent)
    message = str(error.value)
    assert "shard-00002.parquet: No space left on device while writing" in message
    assert "2 of 6 shards are finished and safe" in message
    assert "give the same command again" in message
    distill(given, open_fake, silent)
    distill(options(target, prompts, tmp_path / "whole"), open_fake, silent)
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_a_limit_on_files(target: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = options(target, prompts, out)
    limit = contextlib.ExitStack()

    class Limited(FakeEngine):
        def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
            super().answer(dialogues, progress)
            if dialogues[0].prompt.id == 8:
                limit.enter_context(file_limit(1000))

    with limit, pytest.raises(SpecFormerError) as error:
        distill(given, lambda *_: Limited(), silent)
    message = str(error.value)
    assert "shard-00002.parquet: File too large while writing" in message
    assert "raise the limit on the size of files (`ulimit -f`). 2 of 6 shards are fin" in message
    distill(given, open_fake, silent)
    distill(options(target, prompts, tmp_path / "whole"), open_fake, silent)
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_a_library_that_cannot_write(target: Path, prompts: Path, tmp_path: Path) -> None:
    """vLLM, whose caches go elsewhere."""

    class Full(FakeEngine):
        def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
            with open("/dev/full", "w") as file:
                file.write("cache")

    message = "No space left on device; free some space. 0 of 6 shards are finished and safe"
    with pytest.raises(DiskFullError, match=message):
        distill(options(target, prompts, tmp_path / "out"), lambda *_: Full(), silent)


def test_a_pipe_that_does_not_fit_into_the_temporary_directory(
    target: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"{}\n" * 1000,))
    writer.start()
    message = r"a copy of what a pipe brings, in .*: File too large; raise the limit"
    with file_limit(1000), pytest.raises(DiskFullError, match=message):
        distill(options(target, pipe, tmp_path / "out"), open_fake, silent)
    writer.join()


def test_damaged_shards_are_named_and_made_again(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = options(target, prompts, out)
    manifest = distill(given, open_fake, silent)
    shard = out / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DistilledDataError, match=r"shard-00001\.parquet: .*delete the file"):
        distill(given, open_fake, silent)
    shard.unlink()
    assert distill(given, open_fake, silent) == manifest


def test_prompts_longer_than_the_context_are_counted(target: Path, tmp_path: Path) -> None:
    records = [{"text": "a"}, {"text": "b c d " * 100}, chat("e", "f " * 200), {"text": "g"}]
    prompts = write_lines(tmp_path / "prompts.jsonl", records)
    engine = FakeEngine()
    given = options(target, prompts, tmp_path / "out", sampled_share=0.0)
    manifest = distill(given, lambda *_: engine, silent)
    assert manifest.counts.skipped == {TOO_LONG: 1}
    assert manifest.counts.cut in ({TOO_LONG: 1}, {"answer reached the maximum length": 1})
    assert [row.id for row in rows_of(tmp_path / "out")] == [0, 2, 3]
    only_long = write_lines(tmp_path / "long.jsonl", records[1:2])
    with pytest.raises(SpecFormerError, match=f"not one of 1 prompts could be used: 1 {TOO_LONG}"):
        distill(options(target, only_long, tmp_path / "none"), open_fake, silent)


def test_bad_lines_are_reported(target: Path, prompts: Path, tmp_path: Path) -> None:
    with prompts.open("a") as file:
        file.write("{\n")
    said: list[str] = []
    manifest = distill(options(target, prompts, tmp_path / "out"), open_fake, said.append)
    assert "1 malformed records left out" in said[0]
    assert f"{prompts}, line 24: not valid JSON" in said[0]
    assert manifest.prompts[0].bad == 1


def test_a_template_without_a_place_for_tools_is_told(target: Path, tmp_path: Path) -> None:
    record = chat("a") | {"tools": [{"name": "f"}]}
    prompts = write_lines(tmp_path / "prompts.jsonl", [chat("a"), record, record])
    said: list[str] = []
    manifest = distill(options(target, prompts, tmp_path / "out"), open_fake, said.append)
    assert said[0].startswith("warning: 2 conversations have tools, and the chat template has no")
    assert manifest.counts.conversations == 3


def test_prompts_through_a_pipe(target: Path, prompts: Path, tmp_path: Path) -> None:
    """The same rows as from the file, and a run that is continued from another pipe."""
    content, pipe, out = prompts.read_bytes(), tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)

    def distilled(engine: FakeEngine) -> None:
        writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(content, mtime=0),))
        writer.start()
        try:
            distill(options(target, pipe, out), lambda *_: engine, silent)
        finally:
            writer.join()

    with pytest.raises(KeyboardInterrupt):
        distilled(StoppingEngine(9, KeyboardInterrupt()))
    assert 0 < len(read_manifest(out, allow_incomplete=True).shards) < 6
    distilled(FakeEngine())
    distill(options(target, prompts, tmp_path / "whole"), open_fake, silent)
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_prompts_that_shrink_while_they_are_answered(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    out, content = tmp_path / "out", prompts.read_bytes()

    class Shrinking(FakeEngine):
        def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
            super().answer(dialogues, progress)
            if dialogues[0].prompt.id == 4:
                os.truncate(prompts, len(content) // 2)

    with pytest.raises(PromptError, match=r"has changed since .*\. 2 of 6 shards are finished"):
        distill(options(target, prompts, out), lambda *_: Shrinking(), silent)
    prompts.write_bytes(content)
    distill(options(target, prompts, out), open_fake, silent)
    distill(options(target, prompts, tmp_path / "whole"), open_fake, silent)
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_a_template_that_refuses_everything_is_found_before_the_engine_starts(
    target: Path, tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = Encoder(encoder.tokenizer, "{{ raise_exception('not like this') }}")
    monkeypatch.setattr(run, "load_encoder", lambda *_, **__: strict)
    prompts = write_lines(tmp_path / "prompts.jsonl", [chat("a"), chat("b")])
    with pytest.raises(SpecFormerError, match="each of the first 2 conversations: not like this"):
        distill(options(target, prompts, tmp_path / "out"), lambda *_: 1 / 0, silent)  # type: ignore[arg-type, return-value]


def test_killed_between_any_two_steps(target: Path, prompts: Path, tmp_path: Path) -> None:
    """SIGKILL before some eighty lines of the run's own code, and a second run that finishes."""
    write_lines(prompts, mixed_records(9))
    result = subprocess.run(
        [sys.executable, "-m", KILL_POINTS, str(target), str(prompts), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT / "tests",
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)
    expected, complete = rows_of(tmp_path / "reference"), read_manifest(tmp_path / "reference")
    assert len(expected) == 9
    assert len(found["results"]) > 50
    for name, killed, resumed_killed, requests in found["results"]:
        assert (killed, resumed_killed) == (True, False), name
        assert rows_of(tmp_path / name) == expected, name
        assert read_manifest(tmp_path / name) == complete, name
        assert requests <= found["requests"], name
        assert {p.name for p in (tmp_path / name).iterdir()} == {
            "manifest.json",
            *(shard.file for shard in complete.shards),
        }, name
    assert min(requests for *_, requests in found["results"]) < found["requests"]
