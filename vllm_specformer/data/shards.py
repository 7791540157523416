"""Distilled conversations as Parquet files of token ids.

A shard holds a fixed set of prompts. It is written whole and carries its run's settings, so the
manifest can be made again from the shards alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from vllm_specformer.data.files import write_atomic
from vllm_specformer.data.manifest import (
    DistilledDataError,
    Manifest,
    Settings,
    ShardRecord,
    read_manifest,
)

__all__ = [
    "SCHEMA",
    "Conversation",
    "CutAnswers",
    "Manifest",
    "ShardWriter",
    "cut_answers",
    "read_manifest",
    "read_rows",
    "read_shards",
    "shard_name",
]

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("answer_starts", pa.list_(pa.int32())),
        ("answer_ends", pa.list_(pa.int32())),
        ("temperature", pa.float32()),
        ("finish_reason", pa.string()),
    ]
)
_METADATA_KEY = b"specformer"


@dataclass(frozen=True)
class Conversation:
    """One conversation as the target saw and produced it.

    `id` is the prompt's place in the input; the target generated the half-open spans
    `answer_starts[i]:answer_ends[i]` of `input_ids`, the rest is prompt and template.
    """

    id: int
    input_ids: Sequence[int]
    answer_starts: Sequence[int]
    answer_ends: Sequence[int]
    temperature: float
    finish_reason: str


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


class ShardWriter:
    """Writes the shards of one run and recognises those that are there."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory = directory
        self.settings = settings

    def write(
        self,
        number: int,
        rows: Sequence[Conversation],
        skipped: Mapping[str, int] | None = None,
        cut: Mapping[str, int] | None = None,
    ) -> ShardRecord:
        """Write shard `number` whole; `skipped` and `cut` count by reason what it lacks.

        Raises:
            DiskFullError: nothing was written.
        """
        counts: dict[str, Any] = {
            "file": shard_name(number),
            "rows": len(rows),
            "tokens": sum(len(row.input_ids) for row in rows),
            "answers": sum(len(row.answer_starts) for row in rows),
            "answer_tokens": sum(sum(row.answer_ends) - sum(row.answer_starts) for row in rows),
            "sampled": sum(row.temperature > 0 for row in rows),
            "skipped": dict(skipped or {}),
            "cut": dict(cut or {}),
        }
        about = {"settings": self.settings.model_dump(), "shard": counts}
        metadata = {_METADATA_KEY: json.dumps(about).encode()}
        columns = [[getattr(row, name) for row in rows] for name in SCHEMA.names]
        table = pa.table(columns, schema=SCHEMA.with_metadata(metadata))
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        content = buffer.getvalue().to_pybytes()
        write_atomic(self.directory / shard_name(number), content)
        return ShardRecord(**counts, sha256=hashlib.sha256(content).hexdigest())

    def finished(self, known: Mapping[str, str] | None = None) -> dict[int, ShardRecord]:
        """The shards of this run that are in the directory, by number.

        Args:
            known: file name -> sha256 of shards that a manifest vouches for.

        Raises:
            DistilledDataError: a shard is damaged, or of a run with other settings.
        """
        found = {}
        names = {shard_name(n): n for n in range(self.settings.num_shards)}
        for path in sorted(self.directory.glob("shard-*.parquet")):
            settings, record = _describe(path)
            if path.name not in names or settings != self.settings:
                raise DistilledDataError(
                    f"{path} was written by a run with other settings", "choose another directory"
                )
            if (known or {}).get(path.name, record.sha256) != record.sha256:
                raise _damaged(path, "its content has changed since it was written")
            found[names[path.name]] = record
        return found


def settings_of_shards(directory: Path) -> Settings | None:
    """The settings that the first shard of a directory carries; None where there is no shard."""
    first = min(directory.glob("shard-*.parquet"), default=None)
    return None if first is None else _describe(first)[0]


def read_shards(directory: Path, manifest: Manifest) -> Iterator[pa.Table]:
    """The tables of all shards in order, columns as in `SCHEMA`; one is in memory at a time.

    Raises:
        DistilledDataError: a shard is missing or its bytes are not those the manifest vouches for.
    """
    for record in manifest.shards:
        yield _read(directory / record.file, record.sha256)


@dataclass(frozen=True)
class CutAnswers:
    """Answers that ended before the target ended them: at the longest length, at the context."""

    at_max_tokens: int = 0
    at_context: int = 0


def cut_answers(directory: Path, manifest: Manifest) -> CutAnswers:
    """Count them over all shards; of a conversation only the last answer can be one."""
    columns = ["finish_reason", "answer_starts", "answer_ends"]
    longest, lengths = manifest.sampling.max_tokens, []
    for record in manifest.shards:
        table = pq.read_table(directory / record.file, columns=columns)
        for row in table.to_pylist():
            if row["finish_reason"] == "length" and row["answer_ends"]:
                lengths.append(row["answer_ends"][-1] - row["answer_starts"][-1])
    whole = sum(length == longest for length in lengths)
    return CutAnswers(whole, len(lengths) - whole)


def read_rows(directory: Path, manifest: Manifest) -> Iterator[Conversation]:
    """Every conversation of a directory, in the order of their ids; raises as `read_shards`."""
    for table in read_shards(directory, manifest):
        for values in table.to_pylist():
            yield Conversation(**values)


def _read(path: Path, sha256: str) -> pa.Table:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _damaged(path, "the file is missing") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _damaged(path, "its sha256 is not the one in manifest.json")
    return pq.read_table(pa.BufferReader(content)).select(SCHEMA.names)


def _describe(path: Path) -> tuple[Settings, ShardRecord]:
    content = path.read_bytes()
    try:
        table = pq.read_table(pa.BufferReader(content))
        about = json.loads(table.schema.metadata[_METADATA_KEY])
        sha256 = hashlib.sha256(content).hexdigest()
        return Settings(**about["settings"]), ShardRecord(**about["shard"], sha256=sha256)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        reason = "not a shard of ours" if isinstance(error, ValidationError) else str(error)
        raise _damaged(path, reason) from None


def _damaged(path: Path, reason: str) -> DistilledDataError:
    return DistilledDataError(
        f"{path}: {reason}",
        "delete the file and give the `specformer distill` command again, "
        "which makes just this shard anew",
    )
