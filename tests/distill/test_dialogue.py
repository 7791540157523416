"""Conversations turn by turn: token ids only grow, and the target's own tokens are marked."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.distill.fakes import END, GREEDY, chat, chat_target
from support.distill.fakes import TEMPLATE as CHAT_TEMPLATE
from support.paths import TARGET
from vllm_specformer.data.prompts import Prompt, parse
from vllm_specformer.distill.dialogue import (
    ANSWER_CUT,
    TEMPLATE,
    TOO_LONG,
    Answer,
    Dialogue,
    temperature_of,
)
from vllm_specformer.distill.encode import Encoder, load_encoder
from vllm_specformer.target.files import TargetError

LONG = 10_000
ANSWERS = ("return x + 1", "yes", "no")


def dialogue(prompt: Prompt, encoder: Encoder, context: int = LONG) -> Dialogue:
    return Dialogue(prompt, encoder, GREEDY, context)


def ids(encoder: Encoder, text: str) -> list[int]:
    return list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


def with_template(encoder: Encoder, template: str) -> Encoder:
    return Encoder(encoder.tokenizer, template, {}, encoder.end_ids)


def test_several_turns_read_as_the_template_writes_them(encoder: Encoder) -> None:
    prompt = parse(7, chat("What is f?", "Sure?", "Really?", system="be brief"))
    grown = dialogue(prompt, encoder)
    messages = [{"role": "system", "content": "be brief"}]
    for question, text in zip(("What is f?", "Sure?", "Really?"), ANSWERS, strict=True):
        messages.append({"role": "user", "content": question})
        shown = encoder.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert encoder.decode(grown.request().prompt_ids) == shown
        grown.accept(Answer([*ids(encoder, text), END], "stop"))
        messages.append({"role": "assistant", "content": text})
    assert not grown.is_open
    row = grown.row()
    assert row is not None
    assert row.id == 7
    spans = zip(row.answer_starts, row.answer_ends, strict=True)
    found = [encoder.decode(row.input_ids[start:end]) for start, end in spans]
    assert found == [f"{text}<|endoftext|>" for text in ANSWERS]


def test_answers_are_never_encoded_again(encoder: Encoder) -> None:
    """Two tokens that the tokenizer would write as one stay two."""
    (whole,) = ids(encoder, "return")
    split = [*ids(encoder, "re"), *ids(encoder, "turn")]
    assert whole not in split
    grown = dialogue(parse(0, chat("a", "b")), encoder)
    start = len(grown.request().prompt_ids)
    grown.accept(Answer([*split, END], "stop"))
    assert grown.request().prompt_ids[start:][: len(split)] == split


def test_an_end_token_that_the_template_does_not_write_is_taken_off(encoder: Encoder) -> None:
    """It stays at the very end only, where the target did write it."""
    other = with_template(encoder, CHAT_TEMPLATE.replace("<|endoftext|>", " ###"))
    grown = dialogue(parse(0, chat("a", "b")), other)
    grown.accept(Answer([*ids(encoder, "yes"), END], "stop"))
    assert encoder.decode(grown.request().prompt_ids).endswith(
        "assistant: yes ###\nuser: b\nassistant: "
    )
    grown.accept(Answer([END], "stop"))
    row = grown.row()
    assert row is not None
    assert row.input_ids[-1] == END
    assert [e - s for s, e in zip(row.answer_starts, row.answer_ends, strict=True)] == [
        len(ids(encoder, "yes")),
        1,
    ]


def test_a_first_answer_of_an_end_token_only(encoder: Encoder) -> None:
    other = with_template(encoder, CHAT_TEMPLATE.replace("<|endoftext|>", " ###"))
    grown = dialogue(parse(0, chat("a", "b")), other)
    grown.accept(Answer([END], "stop"))
    grown.accept(Answer([5, END], "stop"))
    row = grown.row()
    assert row is not None
    assert len(row.answer_starts) == len(row.answer_ends) == 1


def test_thinking_stays_in_the_context(encoder: Encoder) -> None:
    """A template that shortens earlier answers changes nothing of what has been generated."""
    shortening = CHAT_TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content.split('</think>')[-1] }}"
    )
    grown = dialogue(parse(0, chat("a", "b")), with_template(encoder, shortening))
    answer = [*ids(encoder, "hmm</think>yes"), END]
    grown.accept(Answer(answer, "stop"))
    assert "hmm</think>yes<|endoftext|>\nuser: b" in encoder.decode(grown.request().prompt_ids)


def test_a_cut_answer_ends_the_conversation(encoder: Encoder) -> None:
    grown = dialogue(parse(0, chat("a", "b")), encoder)
    grown.accept(Answer([5] * 16, "length"))
    assert (grown.is_open, grown.cut, grown.skipped) == (False, ANSWER_CUT, None)
    assert grown.missing_turns == 1
    row = grown.row()
    assert row is not None
    assert row.finish_reason == "length"
    assert row.answer_ends[-1] == len(row.input_ids)


def test_prompts_longer_than_the_context(encoder: Encoder) -> None:
    prompt = parse(0, {"text": "def f(x): return x"})
    length = len(encoder.text(prompt.text or ""))
    assert dialogue(prompt, encoder, length).skipped == TOO_LONG
    assert dialogue(prompt, encoder, length).row() is None
    assert dialogue(prompt, encoder, length + 1).request().max_tokens == 1
    chatting = parse(0, chat("a", "b " * 100))
    first = len(dialogue(chatting, encoder).request().prompt_ids)
    grown = dialogue(chatting, encoder, first + 20)
    grown.accept(Answer([5, END], "stop"))
    assert (grown.cut, grown.skipped) == (TOO_LONG, None)
    row = grown.row()
    assert row is not None
    assert len(row.input_ids) == first + 2


def test_a_template_may_refuse_a_conversation(encoder: Encoder) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    strict = with_template(encoder, template)
    refused = dialogue(parse(0, chat("a", system="s")), strict)
    assert (refused.skipped, refused.reason) == (TEMPLATE, "no system role")
    assert dialogue(parse(0, chat("a")), strict).is_open
    forgetful = with_template(encoder, "{{ messages[-1].content }}")
    grown = dialogue(parse(0, chat("a", "b")), forgetful)
    grown.accept(Answer([5, END], "stop"))
    assert (grown.cut, grown.reason) == (TEMPLATE, "it does not show earlier answers")


TOOLS_TEMPLATE = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + CHAT_TEMPLATE
LOOKED_UP = {
    "messages": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}, {"id": "2"}]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
        {"role": "tool", "content": "wind", "tool_call_id": "2"},
        {"role": "assistant", "content": "somebody else's answer"},
        {"role": "user", "content": "thanks"},
    ],
    "tools": [{"name": "look"}, {"name": "ask"}],
}


def test_tools_are_described_and_their_results_answered(encoder: Encoder) -> None:
    told = with_template(encoder, TOOLS_TEMPLATE)
    assert told.shows_tools
    grown = dialogue(parse(0, LOOKED_UP), told)
    shown = "[look][ask]user: weather?\nassistant: "
    assert told.decode(grown.request().prompt_ids) == shown
    between = ("tool: rain\ntool: wind\nassistant: ", "user: thanks\nassistant: ", None)
    for text, after in zip(ANSWERS, between, strict=True):
        grown.accept(Answer([*ids(told, text), END], "stop"))
        shown += f"{text}<|endoftext|>\n{after}"
        if after:
            assert told.decode(grown.request().prompt_ids) == shown
    assert not grown.is_open


def test_tools_of_a_record_replace_those_of_the_command(encoder: Encoder) -> None:
    given = {"tools": [{"name": "other"}]}
    told = Encoder(encoder.tokenizer, TOOLS_TEMPLATE, given, encoder.end_ids)
    shown = [
        told.decode(dialogue(parse(0, record), told).request().prompt_ids)
        for record in (LOOKED_UP, chat("a"))
    ]
    assert shown == ["[look][ask]user: weather?\nassistant: ", "[other]user: a\nassistant: "]


def test_a_template_that_leaves_out_what_tools_return(encoder: Encoder) -> None:
    """Then the target would be asked twice for one answer."""
    deaf = with_template(
        encoder,
        CHAT_TEMPLATE.replace("messages %}", "messages if message.role != 'tool' %}"),
    )
    assert not deaf.shows_tools
    grown = dialogue(parse(0, LOOKED_UP), deaf)
    assert deaf.decode(grown.request().prompt_ids) == "user: weather?\nassistant: "
    grown.accept(Answer([*ids(deaf, "look"), END], "stop"))
    assert (grown.cut, grown.reason) == (TEMPLATE, "it does not show what tools return")


def test_template_arguments(encoder: Encoder) -> None:
    template = "{% if brief is defined and brief %}!{% endif %}" + CHAT_TEMPLATE
    brief = Encoder(encoder.tokenizer, template, {"brief": True}, encoder.end_ids)
    opening = brief.opening([{"role": "user", "content": "a"}])
    assert brief.decode(opening) == "!user: a\nassistant: "
    assert brief.template_sha256 != encoder.template_sha256


def test_seeds_and_temperatures(encoder: Encoder) -> None:
    mixed = GREEDY.model_copy(update={"sampled_share": 0.25, "top_p": 0.9})
    drawn = [temperature_of(i, mixed) for i in range(2000)]
    assert 0.22 < sum(drawn) / len(drawn) < 0.28
    sampled = Dialogue(parse(drawn.index(1.0), chat("a", "b")), encoder, mixed, LONG)
    first = sampled.request()
    sampled.accept(Answer([5, END], "stop"))
    second = sampled.request()
    assert (first.temperature, first.top_p) == (1.0, 0.9)
    assert None not in (first.seed, second.seed)
    assert first.seed != second.seed
    again = Dialogue(sampled.prompt, encoder, mixed, LONG)
    assert again.request() == first
    greedy = Dialogue(parse(drawn.index(0.0), chat("a")), encoder, mixed, LONG).request()
    assert (greedy.temperature, greedy.top_p, greedy.seed) == (0.0, 1.0, None)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"it has no chat template.*--chat-template FILE"):
        load_encoder(TARGET)
    assert load_encoder(TARGET, chats=False).template_sha256 is None
    file = tmp_path / "template.jinja"
    with pytest.raises(TargetError, match=r"--chat-template .*template\.jinja: not readable"):
        load_encoder(TARGET, file)
    file.write_text(CHAT_TEMPLATE)
    own = load_encoder(chat_target(tmp_path / "chat"))
    assert load_encoder(TARGET, file).template_sha256 == own.template_sha256


answers = st.lists(
    st.tuples(st.lists(st.integers(300, 2000), min_size=1, max_size=16), st.booleans()),
    min_size=4,
    max_size=4,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(turns=st.integers(1, 4), context=st.integers(4, 90), given_answers=answers)
def test_rows_are_sound(
    encoder: Encoder, turns: int, context: int, given_answers: list[tuple[list[int], bool]]
) -> None:
    grown = dialogue(parse(0, chat(*"abcd"[:turns])), encoder, context)
    expected = []
    while grown.is_open:
        request = grown.request()
        assert 1 <= request.max_tokens <= context - len(request.prompt_ids)
        tokens, ends = given_answers[len(expected)]
        tokens = tokens[: request.max_tokens]
        if ends:
            tokens = [*tokens[:-1], END]
        grown.accept(Answer(tokens, "stop" if ends else "length"))
        expected.append(tokens)
    row = grown.row()
    if not expected:
        assert row is None
        return
    assert row is not None
    assert len(row.input_ids) <= context
    spans = list(zip(row.answer_starts, row.answer_ends, strict=True))
    assert [list(row.input_ids[start:end]) for start, end in spans] == expected
    assert spans == sorted(spans)
    assert all(a[1] < b[0] for a, b in pairwise(spans))
    assert spans[-1][1] == len(row.input_ids)
