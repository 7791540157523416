"""What the long-running subcommands share."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # the exit code after Ctrl-C


def say(text: str) -> None:
    """A line for the user, beside what goes to standard output."""
    print(text, file=sys.stderr, flush=True)
