"""Reading prompts: every form, every container, and what is said about bad records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.distill.fakes import chat, write_lines
from vllm_specformer.data.prompts import Prompt, PromptError, PromptSet, derive, parse, scan

USER = {"role": "user", "content": "Hi"}


def everything(found: PromptSet) -> list[Prompt]:
    return list(found.read(list(found.ids)))


def contents(prompt: Prompt) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in prompt.messages]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (chat("a", "b", system="s"), [("system", "s"), ("user", "a"), ("user", "b")]),
        (
            {"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "a"}]},
            [("user", "a")],
        ),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "hello"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "c"},
                ]
            },
            [("user", "a")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}]}]},
            [("user", "a b")],
        ),
        # UltraChat's records hold the first question under `prompt` as well.
        ({"prompt": "Hi", "prompt_id": "1", "messages": [USER]}, [("user", "Hi")]),
        ({"text": None, "messages": [USER]}, [("user", "Hi")]),
    ],
)
def test_conversations_keep_questions_only(record: Any, expected: list[tuple[str, str]]) -> None:
    assert contents(parse(0, record)) == expected


@pytest.mark.parametrize("name", ["text", "prompt"])
def test_plain_text(name: str) -> None:
    assert parse(3, {name: " def f():\n"}) == Prompt(3, text=" def f():\n")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"3", "expected an object, found int"),
        (b'{"question": 1}', "has question, none of messages, conversations, prompt, text"),
        (b'{"text": ""}', "text: empty"),
        (b'{"text": 3}', "text: expected text, found int"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"messages": {}}', "messages: expected a list, found dict"),
        (b'{"messages": []}', "messages: no user message"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "no user message"),
        (b'{"messages": ["x"]}', "an entry is no object with role and content"),
        (b'{"messages": [{"role": "user"}]}', "content: expected text, found NoneType"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool' is not one of system"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "only text parts are supported",
        ),
    ],
)
def test_bad_records_say_why(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(0, raw)


def test_containers_give_the_same_prompts(tmp_path: Path) -> None:
    records = [chat("a"), chat("b", "c", system="s"), chat("ä\u2028ö")]
    jsonl = write_lines(tmp_path / "prompts.jsonl", records)
    listed = tmp_path / "prompts.json"
    listed.write_text(json.dumps(records, indent=1))
    parquet = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(records), parquet)
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf\n\n" + jsonl.read_bytes().replace(b"\n", b"\r\n\r\n"))
    expected = everything(scan([jsonl]))
    assert [prompt.num_turns for prompt in expected] == [1, 2, 1]
    for path in (listed, parquet, marked):
        assert everything(scan([path])) == expected


def test_ids_run_over_all_files_and_count_bad_records(tmp_path: Path) -> None:
    first = tmp_path / "1.jsonl"
    first.write_text('{"text": "a"}\n\nnot json\n{"text": "b"}\n')
    second = write_lines(tmp_path / "2.jsonl", [{"text": "c"}])
    found = scan([first, second])
    assert [(p.id, p.text) for p in everything(found)] == [(0, "a"), (2, "b"), (3, "c")]
    (bad,) = found.bad
    assert bad.startswith(f"{first}, line 3: not valid JSON (Expecting value")
    assert [(file.records, file.bad) for file in found.files] == [(3, 1), (1, 0)]


def test_too_many_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a"}\n' * 20 + "bad\n" * 11)
    with pytest.raises(PromptError) as error:
        scan([path])
    assert f"11 of 31 records are malformed, 10 may be:\n  {path}, line 21:" in str(error.value)
    assert "and 6 more" in str(error.value)
    assert "--max-bad-lines 11" in str(error.value)
    assert len(scan([path], max_bad=11).ids) == 20
    with pytest.raises(PromptError, match="0 may be"):
        scan([path], max_bad=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"[]", "the file is empty"),
        (b"[{", "begins like a JSON list but is none"),
        (b"PAR1 and no more", "not readable as Parquet"),
        (b'{"question": "a"}\n', "no record can be used; the first: "),
        (b"\x1f\x8b\x08", "no record can be used; the first: "),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(content)
    with pytest.raises(PromptError) as error:
        scan([path])
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file or directory; check the path"):
        scan([tmp_path / "nothing.jsonl"])
    with pytest.raises(PromptError, match="Is a directory"):
        scan([tmp_path])


def test_parquet_without_a_known_column(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), path)
    with pytest.raises(PromptError, match="has the columns question, answer, none of messages"):
        scan([path])


def test_drawn_prompts_depend_on_the_seed_alone(tmp_path: Path) -> None:
    found = scan([write_lines(tmp_path / "p.jsonl", [{"text": f"t{i}"} for i in range(200)])])
    drawn = found.select(50, seed=1)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 50
    assert drawn == found.select(50, seed=1)
    assert drawn != found.select(50, seed=2)
    assert set(drawn) < set(found.select(60, seed=1))
    assert [prompt.id for prompt in found.read(drawn)] == drawn
    assert found.select(1000, seed=1) == list(range(200))


def test_derived_numbers() -> None:
    assert derive(0, "a", 1) == derive(0, "a", 1)
    assert len({derive(seed, name, i) for seed in (0, 1) for name in "ab" for i in (1, 11)}) == 8
    assert all(0 <= derive(0, i) < 2**63 for i in range(100))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "conversations", "text", "role", "content", "from", "value"]
            ),
            inner | st.sampled_from(["user", "human", "assistant"]),
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(json_values)
def test_any_json_is_a_prompt_or_refused(value: Any) -> None:
    try:
        prompt = parse(0, json.dumps(value).encode())
    except ValueError:
        return
    assert prompt.num_turns >= 1
    assert all(turn[-1]["role"] == "user" for turn in prompt.turns)
