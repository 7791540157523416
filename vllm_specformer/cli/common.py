"""What the long-running subcommands share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import DiskFullError, write_atomic

INTERRUPTED = 130  # the exit code after Ctrl-C


def say(text: str) -> None:
    """A line for the user, beside what goes to standard output."""
    print(text, file=sys.stderr, flush=True)


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
        raise DiskFullError(f"{error}. Its content is printed above") from None
