"""What the long-running subcommands share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import DiskFullError, write_atomic
from vllm_specformer.errors import SpecFormerError

INTERRUPTED = 130  # the exit code after Ctrl-C


def say(text: str) -> None:
    """A line for the user, beside what goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def fields_of(options: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """The arguments that are fields of a dataclass."""
    return {k: v for k, v in vars(options).items() if k in kind.__dataclass_fields__}


def check_results(paths: Iterable[Path | None]) -> None:
    """Refuse files that could not be written in the end.

    Raises:
        SpecFormerError: the directory of one does not exist or is read-only, or it is one itself.
    """
    for path in paths:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise SpecFormerError(f"{path}: no such directory as {path.parent}; create it")
        if path.is_dir():
            raise SpecFormerError(f"{path}: a directory; name a file")
        if not os.access(path.parent, os.W_OK):
            raise SpecFormerError(f"{path}: {path.parent} cannot be written to; choose another")


def write_json(path: Path, content: Any) -> None:
    """Write a result. Where the disk takes no more it is printed, so that nothing is lost.

    Raises:
        DiskFullError: it was printed.
    """
    text = json.dumps(content, indent=2) + "\n"
    try:
        write_atomic(path, text.encode())
    except DiskFullError as error:
        print(text)
        raise DiskFullError(f"{error}. What the file was to hold stands above") from None
