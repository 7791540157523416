"""The errors that are meant for the person at the keyboard."""

from __future__ import annotations


class SpecFormerError(ValueError):
    """Something the user can put right.

    The commands print the message alone, without a traceback, and end with exit code 2.

    Args:
        problem: names field or file, and the value found.
        remedy: what to do about it, if the problem does not say so.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


class SpeculativeConfigError(SpecFormerError):
    """The speculative config, head and target do not go together."""
