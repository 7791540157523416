"""`specformer distill` as it is typed: options, messages and exit codes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.distill.fakes import FakeEngine, mixed_records, rows_of, write_lines
from vllm_specformer.cli import distill as command
from vllm_specformer.cli.main import main
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.distill import distill as run
from vllm_specformer.distill.backend import EngineError, Progress
from vllm_specformer.distill.dialogue import Dialogue
from vllm_specformer.distill.encode import Encoder
from vllm_specformer.distill.offline import check_engine_args


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", [*mixed_records(6), {"text": "a b " * 200}])


@pytest.fixture
def arguments(
    target: Path,
    prompts: Path,
    tmp_path: Path,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[list[str]]:
    """A command that works, with the made-up engine in vLLM's place."""
    monkeypatch.setattr(run, "load_encoder", lambda *_, **__: encoder)
    use(monkeypatch, FakeEngine())
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out"
    yield ["distill", "--target", str(target), "--prompts", str(prompts), "--out", str(out)]
    signal.signal(signal.SIGTERM, before)


def use(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    monkeypatch.setattr(run, "start_engine", lambda *_: engine)


def test_summary(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], target: Path
) -> None:
    assert main([*arguments, "--max-tokens", "16", "--shard-size", "3"]) == 0
    shown = capsys.readouterr()
    counts = read_manifest(tmp_path / "out").counts
    assert f"6 conversations, {counts.tokens} tokens, {counts.answer_tokens} of them" in shown.out
    assert "warning: left out: 1 prompt longer than the context" in shown.out
    next_command = f"next: specformer train --target {target} --data {tmp_path / 'out'} --out HEAD"
    assert shown.out.endswith(f"{next_command}\n")
    assert "7 prompts in 3 shards" in shown.err
    assert "tokens/s" in shown.err
    assert main([*arguments, "--max-tokens", "16", "--shard-size", "3"]) == 0
    assert capsys.readouterr().out == shown.out


def test_the_last_lines_count_cut_answers(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of earlier runs too; where there are none, there is no such line."""

    class Stopping(FakeEngine):
        def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
            if dialogues[0].prompt.id == 3:
                raise KeyboardInterrupt
            super().answer(dialogues, progress)

    use(monkeypatch, Stopping())
    options = [*arguments, "--max-tokens", "4", "--shard-size", "3"]
    assert main(options) == command.INTERRUPTED
    assert "1 of 3 shards are finished" in capsys.readouterr().err
    use(monkeypatch, FakeEngine())
    assert main(options) == 0
    rows = rows_of(tmp_path / "out")
    cut = [row.id for row in rows if row.finish_reason == "length"]
    assert min(cut) < 3 <= max(cut)
    answers = sum(len(row.answer_starts) for row in rows)
    shown = capsys.readouterr().out
    assert f"\n{len(cut)} of {answers} answers reached --max-tokens 4\n" in shown
    assert "filled the context" not in shown
    assert main([*arguments, "--max-tokens", "16", "--out", str(tmp_path / "other")]) == 0
    assert "reached --max-tokens" not in capsys.readouterr().out


@pytest.fixture
def minding_sigint() -> Iterator[None]:
    """A test run that a shell started in the background ignores the signal from its start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("minding_sigint")
def test_interrupted(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    class Signalled(FakeEngine):
        def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
            if dialogues[0].prompt.id == 3:
                signal.raise_signal(number)
            super().answer(dialogues, progress)

    use(monkeypatch, Signalled())
    options = [*arguments, "--max-tokens", "16", "--shard-size", "3"]
    assert main(options) == command.INTERRUPTED
    assert "interrupted. 1 of 3 shards are finished and safe" in capsys.readouterr().err
    use(monkeypatch, FakeEngine())
    assert main(options) == 0
    assert read_manifest(tmp_path / "out").counts.conversations == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-tokens", "0"], "expected a whole number above 0, found '0'"),
        (["--sampled-share", "1.5"], "expected a number from 0 to 1, found '1.5'"),
        (["--temperature", "-1"], "expected a number from 0 to 2, found '-1'"),
        (["--temperature", "nan"], "expected a number from 0 to 2, found 'nan'"),
        (["--top-p", "0"], "expected a number above 0, at most 1, found '0'"),
        (["--engine-args", "{"], "not valid JSON"),
        (["--engine-args", "[1]"], "expected a JSON object"),
        (["--max-bad-lines", "-1"], "expected a whole number, 0 or more"),
    ],
)
def test_bad_options(
    arguments: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *more]) == 2
    assert f"specformer distill: {more[0]}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--engine", "http://localhost:1", "--dtype", "float32"], "--dtype has no effect with"),
        (["--engine", "http://localhost:1", "--engine-args", '{"a": 1}'], "--engine-args has no"),
        (["--served-model", "x"], "--served-model has no effect with --engine offline"),
        (["--prompts", "nothing.jsonl"], "prompts nothing.jsonl: No such file or directory"),
        (["--target", "/no/model"], "target /no/model: no such directory"),
    ],
)
def test_one_line_and_code_2(
    arguments: list[str],
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert main([*arguments, *more]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"specformer distill: {message}")
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_url_is_checked(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real engines
    assert main([*arguments, "--engine", "ofline"]) == 2
    assert "expected 'offline' or the URL of a server" in capsys.readouterr().err


def test_engine_arguments() -> None:
    known = {"model", "dtype", "tensor_parallel_size"}
    check_engine_args({"tensor_parallel_size": 2}, known)
    with pytest.raises(EngineError, match="'dtype' is set with --dtype"):
        check_engine_args({"dtype": "float32"}, known)
    with pytest.raises(EngineError, match="no engine argument 'tensor-parallel-size'; names are"):
        check_engine_args({"tensor-parallel-size": 2}, known)


def test_an_unexpected_error_says_what_is_safe(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FakeEngine):
        def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
            raise AssertionError("the engine died")

    use(monkeypatch, Broken())
    with pytest.raises(AssertionError):
        main(arguments)
    assert "unexpected error, see below. 0 of 1 shards are finished" in capsys.readouterr().err
