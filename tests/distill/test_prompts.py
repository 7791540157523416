"""Reading prompts: every form of record and container, and what is said about bad ones."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.distill.fakes import chat, write_lines
from vllm_specformer.data.prompts import Prompt, PromptError, PromptSet, derive, parse, scan
from vllm_specformer.data.sources import Source

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
        ({"conversations": [USER, {"role": "assistant", "content": "x"}]}, [("user", "Hi")]),
        ({"messages": [{"from": "human", "value": "Hi"}]}, [("user", "Hi")]),
        ({"prompt": [{"role": "system", "content": "s"}, USER]}, [("system", "s"), ("user", "Hi")]),
        ({"conversations": [USER], "system": "s"}, [("system", "s"), ("user", "Hi")]),
        (
            {"conversations": [{"from": "system", "value": "t"}, USER], "system": "s"},
            [("system", "t"), ("user", "Hi")],
        ),
        # LLaMA-Factory's names: the call is the model's, so it is an answer.
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "b"},
                    {"from": "gpt", "value": "c"},
                ]
            },
            [("user", "a"), ("tool", "b")],
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                    {"role": "tool", "content": "", "tool_call_id": "1"},
                ]
            },
            [("user", "Hi"), ("tool", "")],
        ),
    ],
)
def test_conversations_keep_questions_only(record: Any, expected: list[tuple[str, str]]) -> None:
    assert contents(parse(0, record)) == expected


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("user", ["user", "USER", "human"]),
        ("tool", ["tool", "function", "observation", "ipython"]),
        ("assistant", ["assistant", "gpt", "chatgpt", "model", "BOT", "bard", "bing", "claude"]),
        ("system", ["system", "developer"]),
    ],
)
def test_names_of_roles(role: str, names: list[str]) -> None:
    for name in names:
        turns = [{"from": "human", "value": "Hi"}, {"from": name, "value": "x"}]
        expected = [("user", "Hi"), (role, "x")][: 1 if role == "assistant" else 2]
        assert contents(parse(0, {"conversations": turns})) == expected


TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "g", "strict": True}},
]


def test_tools_and_what_they_return(tmp_path: Path) -> None:
    """Each turn ends where the target is to speak: after a question, after all results of calls."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}, {"id": "2"}]}
    results = [
        {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": "wind", "tool_call_id": "2"},
    ]
    thanks = {"role": "user", "content": "thanks"}
    record = {"messages": [USER, called, *results, thanks], "tools": TOOLS}
    prompt = parse(0, record)
    assert list(prompt.tools) == TOOLS
    assert prompt.turns == [[USER], results, [thanks]]
    written = record | {"tools": json.dumps(TOOLS)}
    nothing = [record | {"tools": none} for none in (None, [], "", "[]")]
    paths = [
        write_lines(tmp_path / "1.jsonl", [record]),
        write_lines(tmp_path / "2.jsonl", [written]),
        tmp_path / "3.parquet",
        tmp_path / "4.parquet",
        write_lines(tmp_path / "5.jsonl", nothing),
    ]
    # Parquet gives every tool the fields of all of them.
    pq.write_table(pa.Table.from_pylist([record]), paths[2])
    pq.write_table(pa.Table.from_pylist([written]), paths[3])
    found = scan(paths)
    assert (found.bad, found.with_tools) == ([], 4)
    read = everything(found)
    assert [list(prompt.tools) for prompt in read] == [TOOLS] * 4 + [[]] * 4
    assert all(prompt.turns == [[USER], results, [thanks]] for prompt in read)


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
        (b'{"messages": ["x"]}', "an entry is no object with role and content or from and value"),
        (b'{"messages": [{"role": "user"}]}', "content: expected text, found NoneType"),
        (
            b'{"messages": [{"role": "critic", "content": "x"}]}',
            "role 'critic' is not one of system, user, assistant, tool",
        ),
        (
            b'{"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "a"}]}',
            "a tool speaks before the user",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": "[{"}', "tools: not valid"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": 3}', "tools: expected a list"),
        (b'{"text": "a", "tools": [{"name": "f"}]}', "a text has no place for tools"),
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
        (b"\x1f\x8b\x08", "packed with gzip, and damaged or not whole"),
        (b'{\n "text": "a"\n}\n{\n "text"', "at line 4 there is no whole object"),
        ('{"text": "a"}\n'.encode("utf-16")[:-1], "not valid UTF-16"),
        (b"PK\x03\x04rest", "a ZIP archive; unpack it"),
        (b"ARROW1\0\0", "an Arrow file; write it as Parquet"),
        (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", "a tar archive; unpack it"),
        (gzip.compress(b"PAR1", mtime=0), "a Parquet file packed with gzip; unpack it"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(content)
    with pytest.raises(PromptError) as error:
        scan([path])
    assert message in str(error.value)
    assert str(path) in str(error.value)


RECORDS = [{"text": f"größe {i} 你好 \u2028"} for i in range(2000)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def texts(found: PromptSet) -> list[str | None]:
    assert not found.bad
    return [prompt.text for prompt in everything(found)]


@pytest.mark.parametrize("name", PACKERS)
def test_packed_files(tmp_path: Path, name: str) -> None:
    path, pack = tmp_path / "prompts", PACKERS[name]
    expected = [record["text"] for record in RECORDS]
    packed = pack(LINES.encode())
    path.write_bytes(packed)
    found = scan([path])
    assert texts(found) == expected
    assert texts(found) == expected  # the second reading
    assert found.files[0].sha256 == hashlib.sha256(packed).hexdigest()
    path.write_bytes(packed + packed)  # as `cat` joins them
    assert texts(scan([path])) == expected * 2
    path.write_bytes(pack(json.dumps(RECORDS, indent=1).encode("utf-16")))
    assert texts(scan([path])) == expected
    for cut in (len(packed) // 2, len(packed) - 3):
        path.write_bytes(packed[:cut])
        with pytest.raises(PromptError, match=f"packed with {name}, and damaged or not whole"):
            scan([path])


def test_zstd_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.zst"
    path.write_bytes(PACKERS["zstd"](LINES.encode()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PromptError, match="takes pyarrow to read; unpack it with `zstd -d`"):
        scan([path])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    """Lines, a list and objects over several lines, with a byte-order mark and without."""
    path = tmp_path / "prompts"
    expected = [record["text"] for record in RECORDS]
    laid_out = "\n".join(json.dumps(r, indent=2, ensure_ascii=False) for r in RECORDS)
    listed = json.dumps(RECORDS, ensure_ascii=False)
    for content in (LINES, LINES.replace("\n", "\r\n"), listed, laid_out):
        path.write_bytes(content.encode(encoding))
        assert texts(scan([path])) == expected


def test_objects_over_several_lines_have_places(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('\n{\n "text":\n  "a"\n}\n\n{\n "txt": "b"\n} {"text": "c"}\n')
    found = scan([path])
    assert [(prompt.id, prompt.text) for prompt in everything(found)] == [(0, "a"), (2, "c")]
    assert found.bad == [f"{path}, line 7: has txt, none of messages, conversations, prompt, text"]


def test_pipes_are_read_once(tmp_path: Path) -> None:
    """What a pipe holds, whole, at every reading: more than fits into its buffer."""
    path, packed = tmp_path / "pipe", gzip.compress(LINES.encode(), mtime=0)
    for content in (LINES.encode(), packed, json.dumps(RECORDS).encode()):
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_bytes, args=(content,))
        writer.start()
        found = scan([path])
        writer.join()
        path.unlink()
        expected = [record["text"] for record in RECORDS]
        assert texts(found) == expected
        assert texts(found) == expected
        assert found.files[0].sha256 == hashlib.sha256(content).hexdigest()


def test_standard_input(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys\n"
        "from vllm_specformer.data.prompts import scan\n"
        "found = scan([pathlib.Path('/dev/stdin')])\n"
        "print(found.files[0].records, [len(list(found.read(found.ids))) for _ in '12'])\n"
    )
    command = [sys.executable, "-c", script]
    piped = subprocess.run(command, input=LINES.encode(), capture_output=True, check=True)
    assert piped.stdout == b"2000 [2000, 2000]\n"
    path = write_lines(tmp_path / "prompts.jsonl", RECORDS)
    with path.open("rb") as file:
        redirected = subprocess.run(command, stdin=file, capture_output=True, check=True)
    assert redirected.stdout == b"2000 [2000, 2000]\n"


def test_files_that_change(tmp_path: Path) -> None:
    """Between the readings, in the middle of the second, and while the first goes on."""
    path = write_lines(tmp_path / "prompts.jsonl", RECORDS)
    found = scan([path])
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    assert len(texts(found)) == 2000  # touched, with the same content
    os.truncate(path, len(content) // 2)
    with pytest.raises(PromptError, match="it has changed since it was checked; give the command"):
        texts(found)
    path.write_bytes(content)
    started = found.read(list(found.ids))
    assert next(started).id == 0
    os.truncate(path, len(content) // 2)
    with pytest.raises(PromptError, match="it has changed since it was checked"):
        next(started)
    path.write_bytes(content)
    started = found.read(list(found.ids))
    first = next(started)
    path.rename(tmp_path / "elsewhere")  # what is open stays what it was
    assert len([first, *started]) == 2000
    with pytest.raises(PromptError, match="No such file or directory"):
        texts(found)
    source = Source(write_lines(path, RECORDS))
    with source.reading(), path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(PromptError, match="it changed while it was read"):
        source.seal()


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
                ["messages", "conversations", "text", "role", "content", "from", "value", "tools"]
            ),
            inner | st.sampled_from(["user", "human", "assistant", "tool"]),
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
    assert all(turn[-1]["role"] in ("user", "tool") for turn in prompt.turns)
