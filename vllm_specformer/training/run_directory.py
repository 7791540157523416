"""The directory of a run: what it was begun with, its checkpoints, the best head so far.

    run.json            settings, target and data it was begun with
    log.jsonl, log.csv  what was measured while it trained
    checkpoints/        the last checkpoint; removed when the run is complete
    best/               the head with the best acceptance so far; likewise
    .states/            hidden states that vLLM has written, while it runs
    about.json          what the result's provenance says of the run itself; likewise
    config.json, model.safetensors, README.md, provenance.json, training.png: the result

Everything appears whole or not at all, so a run may be killed at any moment.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vllm_specformer.data.files import DiskFullError, partial_path, refusal, remedy, write_atomic
from vllm_specformer.errors import SpecFormerError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_REFUSALS = {
    errno.ENOSPC: "the disk of {} is full",
    errno.EDQUOT: "the quota on the disk of {} is used up",
    errno.EFBIG: "a file in {} may not become as large as it has to",
    errno.EROFS: "the disk of {} is read-only",
}
_PROBE_BYTES = 1 << 20
SERVED = "head"  # in a checkpoint: the head as it is served


class RunDiskFullError(DiskFullError):
    """The disk takes no more; the message says what continuing would start from."""


class DirectoryMismatchError(SpecFormerError):
    """The directory was begun with something else; the message names the difference."""


class RunDirectory:
    """Paths and state of one run's directory. Only one process of a run may change it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.best_staging = path / ".best.partial"
        self.staging = self.checkpoints / ".partial"
        self.log = path / "log.jsonl"
        self.about = path / "about.json"
        self.states = path / ".states"
        self.provenance = path / "provenance.json"

    def begin(self, record: dict[str, Any], versions: dict[str, str]) -> list[str]:
        """Compare what the run is begun with to what the directory was begun with, or remember it.

        Nothing is lost by beginning anew where no checkpoint was reached.

        Returns:
            Notes for the user: what has another version now, so that results may differ in their
            last bits; or what differs, so that it begins anew.

        Raises:
            DirectoryMismatchError: begun with something else, or the directory holds other things.
        """
        path = self.path / "run.json"
        differences: list[str] = []
        if path.exists():
            begun = json.loads(path.read_text())
            old = begun.pop("versions", {})
            differences = _differences(begun, json.loads(json.dumps(record)))
        if path.exists() and (self.complete or self.last_checkpoint()):
            if differences:
                raise DirectoryMismatchError(
                    f"--out {self.path} was begun with {'; '.join(differences)}",
                    "repeat what it was begun with, or choose another directory",
                )
            other = [f"{n} {old[n]} -> {v}" for n, v in versions.items() if old.get(n, v) != v]
            return [f"versions changed since the run began: {', '.join(other)}"] if other else []
        others = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
        if others and not path.exists():
            raise DirectoryMismatchError(
                f"--out {self.path} holds {min(others)!r} but no run.json",
                "choose a directory that is new, empty or of the same training",
            )
        self.clean_up()
        content = json.dumps(record | {"versions": versions}, indent=2) + "\n"
        write_atomic(path, content.encode())
        if not differences:
            return []
        return [
            f"{self.path} was begun with {'; '.join(differences)}; it had no checkpoint yet, so "
            "the run begins anew"
        ]

    @property
    def complete(self) -> bool:
        """Whether the result is there. The provenance is written last."""
        return self.provenance.exists()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint; unfinished ones have another name."""
        found = {}
        for path in self.checkpoints.glob("checkpoint-*"):
            if match := _CHECKPOINT.fullmatch(path.name):
                found[int(match[1])] = path
        return found[max(found)] if found else None

    def clear_staging(self) -> None:
        """Remove what a killed run left half written, and make room for the next checkpoint."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def publish_checkpoint(self) -> None:
        """Give the finished checkpoint its name, then remove older ones."""
        (finished,) = self.staging.iterdir()
        publish(finished, self.checkpoints / finished.name)
        shutil.rmtree(self.staging, ignore_errors=True)
        for path in self.checkpoints.iterdir():
            if path.name != finished.name:
                shutil.rmtree(path, ignore_errors=True)

    def best_record(self) -> dict[str, Any] | None:
        """Step and metrics of the best head so far."""
        path = self.best / "evaluation.json"
        return json.loads(path.read_text()) if path.exists() else None

    def keep_best(self, save: Callable[[Path], None], record: dict[str, Any]) -> None:
        """Replace the best head by what `save` writes, with its metrics."""
        shutil.rmtree(self.best_staging, ignore_errors=True)
        self.best_staging.mkdir()
        save(self.best_staging)
        content = json.dumps(record, indent=2) + "\n"
        (self.best_staging / "evaluation.json").write_text(content)
        publish(self.best_staging, self.best)

    def clean_up(self) -> None:
        """Remove what only a run in progress needs."""
        for path in (self.checkpoints, self.best, self.best_staging, self.states):
            shutil.rmtree(path, ignore_errors=True)
        self.about.unlink(missing_ok=True)

    def what_is_safe(self) -> str:
        """For messages: what continuing would start from."""
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            return "There is no checkpoint yet."
        return f"The last checkpoint, {checkpoint.name}, is whole."


def publish(source: Path, destination: Path) -> None:
    """Rename a directory, its content safely on the disk, over another one.

    Between the removal of the old one and the renaming a kill leaves `destination` missing; what
    is published here is made again by continuing from the checkpoint.
    """
    for path in source.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(source)
    if destination.exists():
        shutil.rmtree(destination)
    os.replace(source, destination)
    _sync(destination.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(
    directory: Path, what: str, safe: Callable[[], str], remove: Path
) -> Iterator[None]:
    """Turn a failed write into a message that says what is safe.

    Libraries report it in ways of their own, some without the system's reason: then one more write
    to what they have left tells.

    Args:
        what: what was being written.
        safe: says what is whole on the disk, asked for when it is needed.
        remove: what the failure leaves half written.

    Raises:
        RunDiskFullError: the disk is full, the quota is used up, or the like.
    """
    try:
        yield
    except RunDiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError, DiskFullError) as error:
        number = refusal(error) or _refusal_of_one_more(directory, remove)
        shutil.rmtree(remove, ignore_errors=True)
        if number is None and not isinstance(error, DiskFullError):
            raise
        why = _REFUSALS.get(number or 0, "{} cannot be written to").format(directory)
        advice = remedy(number or 0)
        raise RunDiskFullError(
            f"{why}, {what} could not be written. {safe()} {advice[0].upper()}{advice[1:]} and "
            "give the same command again"
        ) from error


def _refusal_of_one_more(directory: Path, unfinished: Path) -> int | None:
    """How the disk refuses one more write, behind the largest of the unfinished files."""
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    probe = partial_path(directory / "probe")
    path = max(files, key=lambda path: path.stat().st_size, default=probe)
    try:
        with path.open("ab") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return refusal(error)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


def _differences(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for key in sorted(begun.keys() | now.keys()):
        old, new = begun.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new)
        elif old != new:
            found.append(f"{key} {json.dumps(old)}, now {json.dumps(new)}")
    return found
