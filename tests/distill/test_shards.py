"""Shards and manifests: whole or absent, and read only when they are what they say."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support.distill.fakes import GREEDY
from support.file_limits import file_limit
from support.paths import TARGET
from vllm_specformer.data.files import (
    DiskFullError,
    directory_lock,
    partial_path,
    refusal,
    remove_partials,
    sha256_of,
    write_atomic,
    write_errors,
)
from vllm_specformer.data.manifest import DistilledDataError, Manifest, Settings
from vllm_specformer.data.shards import (
    SCHEMA,
    Conversation,
    CutAnswers,
    ShardWriter,
    cut_answers,
    read_manifest,
    read_rows,
    read_shards,
    settings_of_shards,
)
from vllm_specformer.target.files import (
    TargetError,
    end_token_ids,
    find_target,
    fingerprint,
    target_record,
)

ROWS = [
    Conversation(0, [5, 6, 7, 8], [2], [4], 0.0, "stop"),
    Conversation(2, [1, 2, 3, 4, 5], [1, 4], [3, 5], 1.0, "length"),
]


def settings_for(prompt_count: int = 3, **changes: object) -> Settings:
    fields: dict[str, object] = {
        "target": target_record("target", TARGET, None),
        "sampling": GREEDY,
        "chat_template_sha256": None,
        "chat_template_args": {},
        "prompts": [],
        "max_prompts": None,
        "prompt_count": prompt_count,
        "shard_size": 2,
        "engine": "offline",
        "dtype": "auto",
        "context": 64,
    }
    return Settings(**(fields | changes))  # type: ignore[arg-type]


def write_all(directory: Path) -> Manifest:
    chosen = settings_for()
    writer = ShardWriter(directory, chosen)
    shards = [
        writer.write(0, ROWS, {"too long": 1}),
        writer.write(1, [], {"too long": 1}, {"x": 2}),
    ]
    manifest = Manifest.of(chosen, shards, {"python": "3"})
    manifest.write(directory)
    return manifest


def test_round_trip_and_counts(tmp_path: Path) -> None:
    written = write_all(tmp_path)
    manifest = read_manifest(tmp_path, written.target.fingerprint)
    assert manifest == written
    assert manifest.complete
    assert list(read_rows(tmp_path, manifest)) == ROWS
    assert [table.schema.names for table in read_shards(tmp_path, manifest)] == [SCHEMA.names] * 2
    assert pq.read_schema(tmp_path / "shard-00000.parquet").equals(SCHEMA)
    counts = manifest.counts.model_dump()
    assert counts == {
        "conversations": 2,
        "tokens": 9,
        "answers": 3,
        "answer_tokens": 5,
        "sampled": 1,
        "skipped": {"too long": 2},
        "cut": {"x": 2},
    }


def test_cut_answers_are_counted(tmp_path: Path) -> None:
    """By where the last answer of a conversation ended, over all shards."""
    assert cut_answers(tmp_path, write_all(tmp_path)) == CutAnswers(0, 1)
    sampling = GREEDY.model_copy(update={"max_tokens": 2})
    chosen = settings_for(sampling=sampling)
    longer = Conversation(1, [1, 2, 3, 4], [1], [4], 0.0, "stop")
    whole = Conversation(2, [1, 2, 3], [1], [3], 0.0, "length")
    writer = ShardWriter(tmp_path, chosen)
    shards = [writer.write(0, ROWS), writer.write(1, [longer, whole, ROWS[1]])]
    assert cut_answers(tmp_path, Manifest.of(chosen, shards, {})) == CutAnswers(1, 2)


def test_the_manifest_comes_back_from_the_shards(tmp_path: Path) -> None:
    manifest = write_all(tmp_path)
    found = settings_of_shards(tmp_path)
    assert found == manifest.settings
    shards = ShardWriter(tmp_path, found).finished()
    assert Manifest.of(found, shards.values(), manifest.versions) == manifest


def test_readers_refuse(tmp_path: Path) -> None:
    with pytest.raises(DistilledDataError, match=r"manifest\.json: no such file; name a directory"):
        read_manifest(tmp_path)
    write_all(tmp_path)
    with pytest.raises(DistilledDataError, match=r"answers of target .*distill again"):
        read_manifest(tmp_path, "0" * 64)
    manifest = read_manifest(tmp_path)
    shard = tmp_path / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DistilledDataError, match=r"shard-00000\.parquet: its sha256 is not"):
        list(read_rows(tmp_path, manifest))
    shard.unlink()
    with pytest.raises(DistilledDataError, match=r"shard-00000\.parquet: the file is missing"):
        list(read_shards(tmp_path, manifest))
    (tmp_path / "manifest.json").write_text('{"complete": 3}')
    with pytest.raises(DistilledDataError, match="field 'target': Field required"):
        read_manifest(tmp_path)


def test_unfinished_directories_are_read_on_request(tmp_path: Path) -> None:
    chosen = settings_for()
    shard = ShardWriter(tmp_path, chosen).write(0, ROWS)
    Manifest.of(chosen, [shard], {}).write(tmp_path)
    with pytest.raises(DistilledDataError, match="only 1 of 2 shards are there"):
        read_manifest(tmp_path)
    assert list(read_rows(tmp_path, read_manifest(tmp_path, allow_incomplete=True))) == ROWS


def test_shards_of_another_run_or_damaged(tmp_path: Path) -> None:
    manifest = write_all(tmp_path)
    writer = ShardWriter(tmp_path, settings_for(context=65))
    with pytest.raises(DistilledDataError, match="written by a run with other settings"):
        writer.finished()
    writer = ShardWriter(tmp_path, manifest.settings)
    shard = tmp_path / "shard-00001.parquet"
    known = {shard.name: "0" * 64}
    with pytest.raises(DistilledDataError, match="its content has changed since"):
        writer.finished(known)
    for content in (b"", b"PAR1", shard.read_bytes()[:-10]):
        shard.write_bytes(content)
        with pytest.raises(DistilledDataError, match="delete the file and give"):
            writer.finished()


ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
any_rows = st.builds(
    Conversation,
    id=st.integers(0, 2**40),
    input_ids=ids,
    answer_starts=ids,
    answer_ends=ids,
    temperature=st.floats(0, 2, width=32),
    finish_reason=st.sampled_from(["stop", "length"]),
)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(rows=st.lists(any_rows, max_size=5))
def test_any_rows_come_back(
    rows: list[Conversation], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("rows")
    chosen = settings_for(prompt_count=2)
    shard = ShardWriter(directory, chosen).write(0, rows)
    Manifest.of(chosen, [shard], {}).write(directory)
    assert list(read_rows(directory, read_manifest(directory))) == rows
    assert shard.sha256 == sha256_of(directory / shard.file)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    partial_path(path).symlink_to("/dev/full")  # every write to it ends with "no space left"
    with pytest.raises(DiskFullError, match="No space left on device while writing 3 bytes"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    partial_path(path).write_bytes(b"half")
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_limit_on_files_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with file_limit(1000), pytest.raises(DiskFullError) as error:
        write_atomic(path, bytes(1001))
    assert str(error.value) == (
        f"{path}: File too large while writing 1,001 bytes; raise the limit on the size of files "
        "(`ulimit -f`)"
    )
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EDQUOT, "free some space, or have the quota raised"),
        (errno.EROFS, "choose a place that is not read-only"),
        (errno.EACCES, "choose a place that can be written to"),
    ],
)
def test_refused_writes_leave_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskFullError) as error:
        write_atomic(path, b"new")
    assert f"{path}: {os.strerror(number)} while writing 3 bytes; {advice}" in str(error.value)
    assert path.read_bytes() == b"old"


def test_a_read_only_disk_is_no_second_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the unfinished file nor the lock can be removed there."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def write() -> None:
        with monkeypatch.context() as patch, directory_lock(tmp_path):
            patch.setattr(os, "fsync", refuse)
            patch.setattr(Path, "unlink", refuse)
            write_atomic(tmp_path / "file", b"new")

    with pytest.raises(DiskFullError, match="Read-only file system while"):
        write()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError(errno.EACCES, "x"), None),  # reading gives it, too
        (OSError("no number"), None),
        (RuntimeError("I/O error: File too large (os error 27)"), errno.EFBIG),
        (RuntimeError("[Errno 122] Disk quota exceeded: 'x'"), errno.EDQUOT),
        (RuntimeError("write(): fd 4 failed with No space left on device"), errno.ENOSPC),
        (RuntimeError("os error 2"), None),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), None),
    ],
)
def test_refused_writes_are_told_from_other_errors(error: Exception, number: int | None) -> None:
    assert refusal(error) == number
    kind = type(error) if number is None else DiskFullError
    with pytest.raises(kind), write_errors():
        raise error


def test_fingerprint_changes_with_what_matters(tmp_path: Path) -> None:
    target = shutil.copytree(TARGET, tmp_path / "target")
    original = fingerprint(target)
    assert original == fingerprint(TARGET)
    (target / "README.md").write_text("another card")
    assert fingerprint(target) == original
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    tuned = fingerprint(target)
    assert tuned != original
    (target / "config.json").write_text((target / "config.json").read_text() + "\n")
    assert fingerprint(target) != tuned
    assert end_token_ids(target) == {0}


def test_targets_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TargetError, match="no such directory; check the path"):
        find_target("/nowhere/model")
    with pytest.raises(TargetError, match="neither a directory nor a model that could be fetched"):
        find_target("nobody/nothing")
    with pytest.raises(TargetError, match=r"config\.json is missing"):
        find_target(str(tmp_path))
    with pytest.raises(TargetError, match="is a directory and has no revisions"):
        find_target(str(TARGET), "main")
    (tmp_path / "config.json").write_text('{"architectures": ["A"], "vocab_size": 3}')
    with pytest.raises(TargetError, match=r"no \*\.safetensors file"):
        target_record("t", tmp_path, None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert target_record("t", tmp_path, None).vocab_size == 3
    for text, message in (("{}", "'architectures' is missing"), ("[]", "expected a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(TargetError, match=message):
            target_record("t", tmp_path, None)
