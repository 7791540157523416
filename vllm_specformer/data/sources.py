"""Files of prompts as bytes: plain, packed or through a pipe, and the same at every reading.

Prompts are read twice, to check them and to use them. What can be read once only, a pipe, is copied
to an unnamed temporary file. A file that has changed since it was checked is refused.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from vllm_specformer.data.files import sha256_of, write_errors
from vllm_specformer.errors import SpecFormerError

# What a file of each kind begins with, and how it is called.
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
}
_REFUSED = {
    b"PK\x03\x04": ("a ZIP archive", "unpack it with `unzip`"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it with `7z x`"),
    b"\x04\x22\x4d\x18": ("packed with lz4", "unpack it with `lz4 -d`"),
    b"ARROW1": ("an Arrow file", "write it as Parquet"),
}
_TAR, _TAR_PLACE = b"ustar", 257
_HEAD_BYTES = 512


class PromptError(SpecFormerError):
    """A file of prompts cannot be used; the message names file, place and remedy."""


@dataclass(frozen=True)
class Reading:
    """One reading of a source, unpacked.

    Attributes:
        head: its first bytes.
        packed: what it was packed with; None if it was not.
    """

    source: Source
    file: BinaryIO
    content: BinaryIO
    head: bytes
    packed: str | None

    def check(self) -> None:
        """Refuse a file that was changed since the source was made.

        Raises:
            PromptError: it was.
        """
        self.source.check(self.file)


class Source:
    """A file of prompts that gives the same bytes at every reading, or an error.

    Raises:
        PromptError: it cannot be opened.
        DiskFullError: a pipe's content does not fit into the temporary directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._copy: BinaryIO | None = None
        self.sha256: str | None = None
        try:
            with path.open("rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    self._copy = _copied(file)
            with self._open() as file:
                self._stamp = _stamp(file)
        except OSError as error:
            raise PromptError(f"prompts {path}: {error.strerror}", "check the path") from None

    def _open(self) -> BinaryIO:
        """A handle with a place of its own."""
        if self._copy is None:
            return self.path.open("rb")
        return open(f"/proc/self/fd/{self._copy.fileno()}", "rb")

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Read from the beginning.

        Raises:
            PromptError: the file is gone, has changed, is an archive, or is packed and damaged.
        """
        try:
            file = self._open()
        except OSError as error:
            raise PromptError(f"prompts {self.path}: {error.strerror}", "check the path") from None
        with file:
            self.check(file)
            head = file.read(_HEAD_BYTES)
            packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
            try:
                if packed:
                    head = self._unpacked(file, packed).read(_HEAD_BYTES)
                self._refuse_archive(head)
                yield Reading(self, file, self._unpacked(file, packed), head, packed)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                if packed is None or (isinstance(error, OSError) and error.errno):
                    raise
                raise PromptError(
                    f"prompts {self.path}: packed with {packed}, and damaged or not whole "
                    f"({error})",
                    "get the file again",
                ) from None

    def _unpacked(self, file: BinaryIO, packed: str | None) -> BinaryIO:
        """The content from its beginning."""
        file.seek(0)
        if packed is None:
            return file
        if packed == "zstd":
            return self._unpacked_zstd(file)
        return cast(BinaryIO, {"gzip": gzip, "bzip2": bz2, "xz": lzma}[packed].open(file))

    def _unpacked_zstd(self, file: BinaryIO) -> BinaryIO:
        try:
            import pyarrow as pa
        except ImportError:
            raise PromptError(
                f"prompts {self.path}: packed with zstd, which takes pyarrow to read",
                "unpack it with `zstd -d`",
            ) from None
        own = open(f"/proc/self/fd/{file.fileno()}", "rb")  # noqa: SIM115 - pyarrow closes it
        stream = pa.CompressedInputStream(pa.PythonFile(own, "r"), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream))

    def _refuse_archive(self, head: bytes) -> None:
        for magic, (kind, remedy) in _REFUSED.items():
            if head.startswith(magic):
                raise PromptError(f"prompts {self.path}: {kind}", f"{remedy}")
        if head[_TAR_PLACE:].startswith(_TAR):
            raise PromptError(f"prompts {self.path}: a tar archive", "unpack it with `tar -xf`")

    def check(self, file: BinaryIO) -> None:
        """Compare an open handle with what the file was; see `Reading.check`."""
        stamp = _stamp(file)
        if stamp == self._stamp:
            return
        if self.sha256 is None:
            raise PromptError(
                f"prompts {self.path}: it changed while it was read",
                "give the command again when nothing writes to it",
            )
        if self._copy is not None or _digest(file) != self.sha256:
            raise PromptError(
                f"prompts {self.path}: it has changed since it was checked",
                "give the command again when nothing writes to it",
            )
        self._stamp = stamp  # touched, with the same content

    def seal(self) -> str:
        """Hex digest of the file's own bytes, which all later readings must have.

        Raises:
            PromptError: it changed since the source was made.
        """
        with self._open() as file:
            digest = _digest(file)
            self.check(file)
        self.sha256 = digest
        return digest


def _copied(file: BinaryIO) -> BinaryIO:
    with write_errors(f"a copy of what a pipe brings, in {tempfile.gettempdir()}"):
        copy = tempfile.TemporaryFile(prefix="specformer-prompts-")  # noqa: SIM115 - kept open
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
    return cast(BinaryIO, copy)


def _digest(file: BinaryIO) -> str:
    return sha256_of(Path(f"/proc/self/fd/{file.fileno()}"))


def _stamp(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
