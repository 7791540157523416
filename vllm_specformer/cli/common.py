"""What the long-running subcommands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
        SpecFormerError: the directory of one does not exist.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise SpecFormerError(f"{path}: no such directory as {path.parent}; create it")
