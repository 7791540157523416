"""Files that are whole or absent, and directories that one process at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_specformer.errors import SpecFormerError

LOCK_FILE = ".lock"
# Errors that nothing but a write gives, and what to do about them.
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "choose a place that is not read-only, or make it writable",
}
_DENIED = (errno.EACCES, errno.EPERM)
_NUMBER = re.compile(r"(?:os error |\[Errno )(\d+)")
_CHUNK = 1 << 20


class DiskFullError(SpecFormerError):
    """The file system took no more; what was whole before is whole still.

    It is full, or the quota, or larger than a file may be, or read-only: the message says which.
    """


def refusal(error: BaseException) -> int | None:
    """Number of the system's error by which a disk refused a write; None for any other error.

    Libraries wrap such errors in their own, which have the number or its text in their message.
    """
    if isinstance(error, OSError):
        return error.errno if error.errno in _REMEDIES else None
    text = str(error)
    match = _NUMBER.search(text)
    if match and int(match[1]) in _REMEDIES:
        return int(match[1])
    return next((number for number in _REMEDIES if os.strerror(number) in text), None)


def remedy(number: int) -> str:
    """What to do about an error that `refusal` found, beginning in lower case."""
    return _REMEDIES.get(number, "choose a place that can be written to")


def refused(what: object, number: int) -> DiskFullError:
    """The error for a write that the disk refused, by the number of the system's error."""
    return DiskFullError(f"{what}: {os.strerror(number)}", f"{remedy(number)}")


@contextmanager
def write_errors(what: str = "") -> Iterator[None]:
    """Turn a write that the disk refuses into one message, whichever library reports it.

    Raises:
        DiskFullError: instead of the system's or a library's error; other errors pass.
    """
    try:
        yield
    except SpecFormerError:
        raise
    except Exception as error:
        number = refusal(error)
        if number is None:
            raise
        name = what or getattr(error, "filename", None)
        if name:
            raise refused(name, number) from error
        raise DiskFullError(f"{error}", f"{remedy(number)}") from error


class DirectoryInUseError(SpecFormerError):
    """Another process is writing to the directory."""


def partial_path(path: Path) -> Path:
    """Where `path` is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def write_atomic(path: Path, content: bytes) -> None:
    """Write `path` so that a kill or a power cut leaves the old file or the new one, whole.

    Raises:
        DiskFullError: the disk takes no more, or nothing here; the unfinished file is removed.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):  # of a disk that has become read-only
            partial.unlink(missing_ok=True)
        number = error.errno or 0
        if number in _REMEDIES or number in _DENIED:
            raise DiskFullError(
                f"{path}: {error.strerror} while writing {len(content):,} bytes",
                f"{remedy(number)}",
            ) from None
        raise


def _sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Create `directory` and keep other processes of this kind out of it.

    The lock belongs to the process, so the system drops it however the process ends, and a child
    that outlives it does not keep it. A lock file without a living owner is taken over. Within one
    process a second lock is not refused.

    Raises:
        DirectoryInUseError: another process holds the lock; the message names it.
        SpecFormerError: the directory cannot be created or written to.
    """
    existed = directory.exists()
    path = directory / LOCK_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
    except OSError as error:
        raise SpecFormerError(
            f"{directory}: cannot be written to ({error.strerror})", "choose another directory"
        ) from None
    try:
        with suppress(OSError):  # on a full disk the lock holds, without a name on it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        # Removed while still locked: whoever opened it meanwhile sees that it has lost its name.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)
        if not existed:
            with suppress(OSError):  # it is kept if anything was written
                directory.rmdir()


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except OSError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise DirectoryInUseError(
                f"{path.parent} is in use by another run ({owner or 'just started'})",
                "wait for it or choose another directory",
            ) from None
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_partials(directory: Path) -> None:
    """Delete what killed runs left unfinished; call it under the directory's lock."""
    for path in directory.glob(".*.partial"):
        path.unlink(missing_ok=True)
