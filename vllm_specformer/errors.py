"""The errors that are meant for the person at the keyboard."""

from __future__ import annotations


class SpecFormerError(ValueError):
    """Something the user can put right; the message names field or file, value and remedy.

    The commands print the message alone, without a traceback, and end with exit code 2.
    """


class SpeculativeConfigError(SpecFormerError):
    """The speculative config, head and target do not go together."""
