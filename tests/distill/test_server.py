"""Distilling from a server by URL: what is sent, what comes back, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.distill.fakes import GREEDY, mixed_records, open_fake, options, rows_of, write_lines
from support.distill.http_server import Behaviour, serving
from vllm_specformer.data.manifest import Manifest, Sampling
from vllm_specformer.data.prompts import parse
from vllm_specformer.distill import distill as run
from vllm_specformer.distill import server
from vllm_specformer.distill.backend import EngineError
from vllm_specformer.distill.dialogue import Dialogue
from vllm_specformer.distill.distill import distill
from vllm_specformer.distill.encode import Encoder
from vllm_specformer.distill.server import NOT_SAME, REFUSED, ServerEngine, base_url

COUNT = 23


@pytest.fixture
def behaviour(encoder: Encoder) -> Behaviour:
    return Behaviour(encoder)


@pytest.fixture
def url(behaviour: Behaviour) -> Iterator[str]:
    with serving(behaviour) as address:
        yield address


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", mixed_records(COUNT))


@pytest.fixture(autouse=True)
def _tokenizer_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_encoder", lambda *_, **__: encoder)
    monkeypatch.setattr(server, "RETRIES", 2)


def from_server(url: str, target: Path, prompts: Path, out: Path, **changes: Any) -> Manifest:
    given = options(target, prompts, out, **({"engine": url, "served_model": "served"} | changes))
    return distill(given, report=lambda _: None)


def connect(url: str, encoder: Encoder, **changes: Any) -> ServerEngine:
    arguments: dict[str, Any] = {"model": "served", "encoder": encoder, "concurrency": 4}
    return ServerEngine(url, **(arguments | changes))


def test_the_same_answers_as_in_this_process(
    target: Path, prompts: Path, tmp_path: Path, url: str, behaviour: Behaviour
) -> None:
    manifest = from_server(url, target, prompts, tmp_path / "out", concurrency=3)
    distill(options(target, prompts, tmp_path / "fake"), open_fake, lambda _: None)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "fake")
    assert (manifest.engine, manifest.context) == ("server", 96)
    assert manifest.versions["server"] == "vLLM"
    assert 1 <= behaviour.most_busy <= 3
    body = behaviour.seen[-1]
    # What vLLM would take from the model's generation_config.json is stated.
    assert body["return_token_ids"] is True
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
    assert (body["frequency_penalty"], body["presence_penalty"]) == (0.0, 0.0)


def test_server_errors_are_tried_again(
    target: Path, prompts: Path, tmp_path: Path, url: str, behaviour: Behaviour
) -> None:
    behaviour.errors = [200, 500, 429, 200, 503]
    manifest = from_server(url, target, prompts, tmp_path / "out")
    assert manifest.counts.conversations == COUNT
    assert not behaviour.errors


def test_a_server_that_stays_away_leaves_whole_shards(
    target: Path, prompts: Path, tmp_path: Path, url: str, behaviour: Behaviour
) -> None:
    behaviour.errors = [200] * 12 + [500] * 100
    with pytest.raises(EngineError, match=r"error 500 \(.*not today.*\. [1-9] of 6 shards are"):
        from_server(url, target, prompts, tmp_path / "out", concurrency=1)
    behaviour.errors = []
    from_server(url, target, prompts, tmp_path / "out")
    distill(options(target, prompts, tmp_path / "fake"), open_fake, lambda _: None)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "fake")


def test_prompts_that_the_server_refuses_are_counted(
    target: Path, prompts: Path, tmp_path: Path, url: str, behaviour: Behaviour
) -> None:
    behaviour.errors = [200, 200, 400]
    manifest = from_server(url, target, prompts, tmp_path / "out", concurrency=1)
    assert manifest.counts.skipped | manifest.counts.cut == manifest.counts.cut | {REFUSED: 1}
    behaviour.refuse_after = len(behaviour.seen) + 1
    with pytest.raises(EngineError, match=r"not one of the 4 prompts .*not today"):
        from_server(url, target, prompts, tmp_path / "other")


def test_text_is_encoded_again_only_where_it_gives_the_same_tokens(
    encoder: Encoder, url: str, behaviour: Behaviour
) -> None:
    behaviour.token_ids = False
    engine = connect(url, encoder)
    assert not engine.returns_ids
    prompt = encoder.text("def f(x):")
    ids = encoder.text(" return x + 1")
    text = encoder.decode(ids)
    for counted in (None, len(ids)):
        assert engine._encoded_again(prompt, text, "length", counted) == ids
    for counted in (None, len(ids) + 1):
        assert engine._encoded_again(prompt, text, "stop", counted) == [*ids, 0]
    assert engine._encoded_again(prompt, text, "length", len(ids) + 1) is None
    assert engine._encoded_again(prompt, text, "stop", len(ids)) is None
    assert engine._encoded_again(prompt, "\ufffd", "stop", None) is None


def test_answers_whose_text_does_not_give_their_tokens_are_left_out(
    target: Path,
    prompts: Path,
    tmp_path: Path,
    encoder: Encoder,
    url: str,
    behaviour: Behaviour,
) -> None:
    """The made-up answers are random tokens, few of which a tokenizer would write that way."""
    behaviour.token_ids = False
    counts = from_server(url, target, prompts, tmp_path / "out").counts
    assert counts.skipped[NOT_SAME] > 0
    distill(options(target, prompts, tmp_path / "fake"), open_fake, lambda _: None)
    true = {row.id: row for row in rows_of(tmp_path / "fake")}
    kept = rows_of(tmp_path / "out")
    assert kept
    for row in kept:  # later answers depend on the tokens of earlier ones
        end, same = row.answer_ends[0], true[row.id]
        assert end == same.answer_ends[0]
        assert encoder.decode(row.input_ids[:end]) == encoder.decode(same.input_ids[:end])


def test_a_server_that_knows_only_openai_s_fields(
    encoder: Encoder, url: str, behaviour: Behaviour
) -> None:
    behaviour.known_fields_only = True
    assert connect(url, encoder).fields == {}


def test_other_ends_of_an_answer(encoder: Encoder, url: str, behaviour: Behaviour) -> None:
    behaviour.finish_reason = "content_filter"
    engine = connect(url, encoder)
    dialogue = Dialogue(parse(0, {"text": "a"}), encoder, GREEDY, engine.context)
    engine.answer([dialogue], run.ProgressBar(1, 0))
    assert dialogue.skipped == "finish_reason 'content_filter'"


def test_sampled_requests_carry_a_seed(encoder: Encoder, url: str, behaviour: Behaviour) -> None:
    engine = connect(url, encoder)
    hot = Sampling(**(GREEDY.model_dump() | {"sampled_share": 1.0, "top_p": 0.9}))
    for sampling in (hot, GREEDY):
        engine.answer(
            [Dialogue(parse(0, {"text": "a"}), encoder, sampling, 96)], run.ProgressBar(1, 0)
        )
    sampled, greedy = behaviour.seen[-2:]
    assert 0 <= sampled["seed"] < 2**31
    assert (sampled["temperature"], sampled["top_p"]) == (1.0, 0.9)
    assert "seed" not in greedy


def test_context_of_a_server(encoder: Encoder, url: str, behaviour: Behaviour) -> None:
    assert connect(url, encoder).context == 96
    assert connect(url, encoder, max_model_len=50, default_context=20).context == 50
    assert connect(url, encoder, max_model_len=500).context == 96
    behaviour.max_model_len = None
    assert connect(url, encoder, default_context=20).context == 20
    assert connect(url, encoder, max_model_len=50, default_context=20).context == 50
    with pytest.raises(EngineError, match="does not say how long its context is; give --max-model"):
        connect(url, encoder)


def test_servers_that_cannot_be_used(encoder: Encoder, url: str, behaviour: Behaviour) -> None:
    with pytest.raises(EngineError, match=r"does not serve 'mine' but 'served'; .*--served-model"):
        connect(url, encoder, model="mine")
    behaviour.extra_prompt_tokens = 1
    with pytest.raises(EngineError, match=r"made \d+ tokens of \d+ that were sent"):
        connect(url, encoder)
    behaviour.takes_token_ids = False
    with pytest.raises(EngineError, match=r"refuses a prompt of token ids .*not today"):
        connect(url, encoder)
    behaviour.html = True
    with pytest.raises(EngineError, match="the answer is not one of OpenAI's API"):
        connect(url, encoder)


def test_wrong_urls(encoder: Encoder) -> None:
    with pytest.raises(EngineError, match=r"no answer .* is the server up, and is the URL right"):
        connect("http://127.0.0.1:1", encoder)
    for wrong in ("ofline", "127.0.0.1:8000", "http://", "ftp://a"):
        with pytest.raises(EngineError, match="expected 'offline' or the URL of a server"):
            connect(wrong, encoder)
    assert base_url("http://a:1") == base_url("http://a:1/") == "http://a:1/v1"
    assert base_url("http://a/v1/") == "http://a/v1"
    assert base_url("https://a/openai/v2") == "https://a/openai/v2"
