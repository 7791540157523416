"""Prompts from JSONL, JSON and Parquet files: what users said, with the answers left out.

A record is a conversation (`messages` or `conversations`) or a text to be continued (`prompt` or
`text`). Its number over all files, bad ones counted, is its id. Files are read twice, once to check
them and once while generating, so that only what is being answered is in memory.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import sha256_of
from vllm_specformer.data.manifest import PromptFile
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.places import lasting

FORMS = ("messages", "conversations", "prompt", "text")  # the first that a record has counts
SHOWN = 5
_PARQUET_MAGIC, _BOM = b"PAR1", b"\xef\xbb\xbf"
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}

Message = dict[str, str]


class PromptError(SpecFormerError):
    """A file of prompts cannot be used; the message names file, place and remedy."""


class _BadRecordError(ValueError):
    """Why one record is left out."""


@dataclass(frozen=True)
class Prompt:
    """System and user messages of a conversation in order, or a text to be continued."""

    id: int
    messages: tuple[Message, ...] = ()
    text: str | None = None

    @property
    def turns(self) -> list[list[Message]]:
        """Messages up to and including each user message that wants an answer."""
        turns: list[list[Message]] = [[]]
        for message in self.messages:
            turns[-1].append(message)
            if message["role"] == "user":
                turns.append([])
        return turns[:-1]

    @property
    def num_turns(self) -> int:
        return 1 if self.text is not None else len(self.turns)


@dataclass
class PromptSet:
    """What a first reading of the files has found."""

    paths: list[Path]
    files: list[PromptFile] = field(default_factory=list)
    ids: array[int] = field(default_factory=lambda: array("q"))
    num_turns: array[int] = field(default_factory=lambda: array("l"))
    chats: int = 0
    bad: list[str] = field(default_factory=list)

    def select(self, count: int | None, seed: int) -> list[int]:
        """Ids in rising order: all, or `count` of them drawn by `seed`."""
        if count is None or count >= len(self.ids):
            return list(self.ids)
        ranked = sorted(self.ids, key=lambda i: (derive(seed, "select", i), i))
        return sorted(ranked[:count])

    def turns_of(self, ids: Sequence[int]) -> int:
        """How many answers the prompts with these ids want."""
        turns = dict(zip(self.ids, self.num_turns, strict=True))
        return sum(turns[i] for i in ids)

    def read(self, ids: Sequence[int]) -> Iterator[Prompt]:
        """The prompts with these rising ids, one at a time."""
        wanted, number = set(ids), 0
        for path in self.paths:
            for _, raw in _records(path):
                if number in wanted:
                    yield parse(number, raw)
                number += 1


def derive(seed: int, *parts: object) -> int:
    """A 63-bit number that depends on nothing but its arguments."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def scan(paths: Sequence[Path], max_bad: int | None = None) -> PromptSet:
    """Read every record once and check it.

    Args:
        max_bad: bad records that may be left out; None allows 1%, and 10 in small files.

    Raises:
        PromptError: a file is missing, empty or of an unknown form, or too many records are bad.
    """
    found, number = PromptSet(list(paths)), 0
    for path in paths:
        first, records, usable = len(found.bad), 0, 0
        for place, raw in _records(path):
            try:
                prompt = parse(number, raw)
            except _BadRecordError as error:
                found.bad.append(f"{path}, {place}: {error}")
            else:
                found.ids.append(number)
                found.num_turns.append(prompt.num_turns)
                found.chats += prompt.text is None
                usable += 1
            number += 1
            records += 1
        if not records:
            raise PromptError(f"prompts {path}: the file is empty")
        bad = len(found.bad) - first
        if not usable:
            raise PromptError(
                f"prompts {path}: no record can be used; the first: {found.bad[first]}"
            )
        found.files.append(
            PromptFile(file=lasting(path), sha256=sha256_of(path), records=records, bad=bad)
        )
    allowed = max(10, number // 100) if max_bad is None else max_bad
    if len(found.bad) > allowed:
        raise PromptError(
            f"prompts: {len(found.bad)} of {number} records are malformed, {allowed} may be:\n"
            + shortened(found.bad)
            + f"\nput them right, or leave them out with --max-bad-lines {len(found.bad)}"
        )
    return found


def shortened(lines: Sequence[str]) -> str:
    """The first few lines, indented, and how many more there are."""
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  and {len(lines) - SHOWN} more")
    return "\n".join(shown)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Place in the file and raw content of every record; lines are not parsed yet."""
    try:
        with path.open("rb") as file:
            start = file.read(64).removeprefix(_BOM).lstrip()
    except OSError as error:
        raise PromptError(f"prompts {path}: {error.strerror}; check the path") from None
    if start.startswith(_PARQUET_MAGIC):
        yield from _parquet_rows(path)
    elif start.startswith(b"["):
        yield from _list_entries(path)
    else:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(_BOM) if number == 1 else line
                if not content.isspace() and content:
                    yield f"line {number}", content


def _list_entries(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"prompts {path}: begins like a JSON list but is none ({error}); put it right, or "
            "write one JSON object per line"
        ) from None
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", entry


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = [name for name in FORMS if name in file.schema_arrow.names]
        if not columns:
            raise PromptError(
                f"prompts {path}: has the columns {', '.join(file.schema_arrow.names)}, none of "
                f"{', '.join(FORMS)}; rename one"
            )
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pa.ArrowException as error:
        raise PromptError(f"prompts {path}: not readable as Parquet ({error})") from None


def parse(number: int, raw: Any) -> Prompt:
    """Build a prompt from a line of JSON or a record.

    Raises:
        ValueError: the record is malformed; the message says how.
    """
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _BadRecordError(f"not valid JSON ({error})") from None
    if not isinstance(raw, Mapping):
        raise _BadRecordError(f"expected an object, found {type(raw).__name__}")
    form = next((name for name in FORMS if raw.get(name) is not None), None)
    if form is None:
        fields = ", ".join(map(str, raw)) or "nothing"
        raise _BadRecordError(f"has {fields}, none of {', '.join(FORMS)}")
    value = raw[form]
    if form in ("prompt", "text"):
        return Prompt(number, text=_checked(value, form))
    keys = ("role", "content") if form == "messages" else ("from", "value")
    return Prompt(number, messages=_questions(value, form, *keys))


def _questions(turns: Any, form: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    """System and user messages of a conversation; answers are dropped unread."""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise _BadRecordError(f"{form}: expected a list, found {type(turns).__name__}")
    kept: list[Message] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or role_key not in turn:
            raise _BadRecordError(
                f"{form}: an entry is no object with {role_key} and {content_key}"
            )
        role = _ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise _BadRecordError(
                f"{form}: {role_key} {turn[role_key]!r} is not one of system, user and assistant"
            )
        content = turn.get(content_key)
        if role == "assistant" or (role == "system" and not content):
            continue
        kept.append({"role": role, "content": _checked(_joined(content), content_key)})
    if not any(message["role"] == "user" for message in kept):
        raise _BadRecordError(f"{form}: no user message")
    return tuple(kept)


def _joined(content: Any) -> Any:
    """The text of a message given as a list of parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
        raise _BadRecordError("content: only text parts are supported")
    return "".join(str(part.get("text", "")) for part in content)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRecordError(f"{name}: expected text, found {type(value).__name__}")
    if not value.strip():
        raise _BadRecordError(f"{name}: empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRecordError(f"{name}: half of a surrogate pair, not valid Unicode") from None
    return value
