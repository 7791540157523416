"""The records of a file of prompts, whatever contains them: lines, a list, objects or Parquet."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from vllm_specformer.data.conversations import FIELDS, FORMS
from vllm_specformer.data.sources import PromptError, Reading

_PARQUET_MAGIC, _BOM = b"PAR1", b"\xef\xbb\xbf"
# JSON that is laid out for reading breaks its lines after these.
_OPEN_ENDS = (b"{", b"[", b",", b":")
_SPACE = re.compile(r"\s*")


def records(reading: Reading) -> Iterator[tuple[str, Any]]:
    """Place in the file and raw content of every record; lines of JSON are not parsed yet.

    Raises:
        PromptError: the file as a whole cannot be read.
    """
    if reading.head.startswith(_PARQUET_MAGIC):
        yield from _parquet_rows(reading)
        return
    # By its mark, or by where the zeros are: text may be UTF-16, as some systems write it.
    encoding = json.detect_encoding(reading.head[:4])
    start = reading.head.decode(encoding, errors="ignore").encode().removeprefix(_BOM).lstrip()
    first, newline, _ = start.partition(b"\n")
    if start.startswith(b"["):
        yield from _list_entries(reading, encoding)
    elif newline and start.startswith(b"{") and first.rstrip().endswith(_OPEN_ENDS):
        yield from _objects(reading, encoding)
    else:
        yield from _lines(reading, encoding)


def _lines(reading: Reading, encoding: str) -> Iterator[tuple[str, bytes]]:
    lines = iter(reading.content)
    if not encoding.startswith("utf-8"):
        lines = _as_utf8(reading, encoding)
    for number, line in enumerate(lines, start=1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if not content.isspace() and content:
            yield f"line {number}", content


def _as_utf8(reading: Reading, encoding: str) -> Iterator[bytes]:
    text = io.TextIOWrapper(reading.content, encoding, newline="\n")
    try:
        for line in text:
            yield line.encode()
    except UnicodeError as error:
        raise _wrong_encoding(reading, encoding, error) from None
    finally:
        text.detach()  # it would close the file


def _whole(reading: Reading, encoding: str) -> str:
    try:
        return reading.content.read().decode(encoding)
    except UnicodeError as error:
        raise _wrong_encoding(reading, encoding, error) from None


def _wrong_encoding(reading: Reading, encoding: str, error: UnicodeError) -> PromptError:
    return PromptError(
        f"prompts {reading.source.path}: not valid {encoding.upper()} ({error})",
        "write it as UTF-8",
    )


def _list_entries(reading: Reading, encoding: str) -> Iterator[tuple[str, Any]]:
    text = _whole(reading, encoding)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"prompts {reading.source.path}: begins like a JSON list but is none ({error})",
            "put it right, or write one JSON object per line",
        ) from None
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", entry


def _objects(reading: Reading, encoding: str) -> Iterator[tuple[str, Any]]:
    """JSON objects of several lines each, one after another."""
    text, decoder = _whole(reading, encoding), json.JSONDecoder()
    end, line = 0, 1
    while (start := _skip_space(text, end)) < len(text):
        line += text.count("\n", end, start)
        try:
            entry, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise PromptError(
                f"prompts {reading.source.path}: begins like JSON over several lines, but at line "
                f"{line} there is no whole object ({error})",
                "put it right, or write one JSON object per line",
            ) from None
        yield f"line {line}", entry
        line += text.count("\n", start, end)


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _parquet_rows(reading: Reading) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = reading.source.path
    if reading.packed:
        raise PromptError(
            f"prompts {path}: a Parquet file packed with {reading.packed}",
            "unpack it, Parquet is compressed in itself",
        )
    try:
        file = pq.ParquetFile(reading.file)
        names = file.schema_arrow.names
        if not set(FORMS).intersection(names):
            raise PromptError(
                f"prompts {path}: has the columns {', '.join(names)}, none of {', '.join(FORMS)}",
                "rename one",
            )
        number = 0
        columns = [name for name in FIELDS if name in names]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", {name: _without_nulls(row[name]) for name in row}
    except pa.ArrowException as error:
        raise PromptError(f"prompts {path}: not readable as Parquet ({error})") from None


def _without_nulls(value: Any) -> Any:
    """A row's value as it was before Parquet gave every structure the fields of all others."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
