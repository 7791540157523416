"""Prompts from JSONL, JSON and Parquet files: what users said, with the answers left out.

A record's number over all files, bad ones counted, is its id. Files are read twice, once to check
them and once while generating, so that only what is being answered is in memory. See `sources` for
how files may arrive, `records` for what contains records, `conversations` for what a record may be.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_specformer.data.conversations import (
    BadRecordError,
    Message,
    Prompt,
    Tool,
    parse,
    shows_tools,
)
from vllm_specformer.data.manifest import PromptFile
from vllm_specformer.data.records import records
from vllm_specformer.data.sources import PromptError, Reading, Source
from vllm_specformer.places import lasting

__all__ = [
    "Message",
    "Prompt",
    "PromptError",
    "PromptSet",
    "Tool",
    "derive",
    "parse",
    "scan",
    "shortened",
    "shows_tools",
    "without_tools",
]

SHOWN = 5


@dataclass
class PromptSet:
    """What a first reading of the files has found."""

    sources: list[Source] = field(default_factory=list)
    files: list[PromptFile] = field(default_factory=list)
    ids: array[int] = field(default_factory=lambda: array("q"))
    num_turns: array[int] = field(default_factory=lambda: array("l"))
    chats: int = 0
    with_tools: int = 0
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
        """The prompts with these rising ids, one at a time.

        Raises:
            PromptError: a file is no longer what it was when it was checked.
        """
        wanted, number = set(ids), 0
        for source in self.sources:
            with source.reading() as reading:
                for _, raw in records(reading):
                    if number in wanted:
                        reading.check()
                        yield parse(number, raw)
                    number += 1
                reading.check()


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
    found, number = PromptSet(), 0
    for path in paths:
        source = Source(path)
        found.sources.append(source)
        with source.reading() as reading:
            file = _scan_file(found, reading, number)
        found.files.append(file)
        number += file.records
    allowed = max(10, number // 100) if max_bad is None else max_bad
    if len(found.bad) > allowed:
        raise PromptError(
            f"prompts: {len(found.bad)} of {number} records are malformed, {allowed} may be:\n"
            + shortened(found.bad)
            + f"\nput them right, or leave them out with --max-bad-lines {len(found.bad)}"
        )
    return found


def _scan_file(found: PromptSet, reading: Reading, number: int) -> PromptFile:
    """Check every record of a file; the first has this number."""
    path, first, usable, count = reading.source.path, len(found.bad), 0, 0
    for count, (place, raw) in enumerate(records(reading), start=1):
        try:
            prompt = parse(number + count - 1, raw)
        except BadRecordError as error:
            found.bad.append(f"{path}, {place}: {error}")
        else:
            found.ids.append(prompt.id)
            found.num_turns.append(prompt.num_turns)
            found.chats += prompt.text is None
            found.with_tools += bool(prompt.tools)
            usable += 1
    if not count:
        raise PromptError(f"prompts {path}: the file is empty")
    if not usable:
        raise PromptError(
            f"prompts {path}: no record can be used", f"the first: {found.bad[first]}"
        )
    return PromptFile(
        file=lasting(path),
        sha256=reading.source.seal(),
        records=count,
        bad=len(found.bad) - first,
    )


def without_tools(count: int) -> str:
    """The warning for a template without a place for tools, which so many conversations have."""
    return (
        f"{count:,} conversations have tools, and the chat template has no place for them: the "
        "target is asked without"
    )


def shortened(lines: Sequence[str]) -> str:
    """The first few lines, indented, and how many more there are."""
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  and {len(lines) - SHOWN} more")
    return "\n".join(shown)
