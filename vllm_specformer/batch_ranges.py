"""Ranges of batch sizes with a value each, `[[first, last, value], ...]`, as vLLM's schedules."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any


def ranges_problem(ranges: Any, name: str, fits: Callable[[Any], bool]) -> str:
    """What is wrong with ranges of batch sizes, "" where nothing is.

    Args:
        name: of the values, for the message.
        fits: whether something is such a value.
    """
    if not isinstance(ranges, (list, tuple)) or not ranges:
        return "it is no list of ranges"
    for entry in ranges:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            return f"{reprlib.repr(entry)} is not [first, last, {name}]"
        first, last, value = entry
        if not _is_whole(first) or not _is_whole(last) or not 1 <= first <= last:
            return f"{reprlib.repr(entry)} must have whole numbers 1 <= first <= last"
        if not fits(value):
            return f"{reprlib.repr(entry)} has {reprlib.repr(value)} for its {name}"
    ranges = sorted((first, last) for first, last, _ in ranges)
    if ranges[0][0] != 1:
        return "the first range must start at 1"
    for (_, last), (first, _) in pairwise(ranges):
        if first <= last:
            return f"two ranges hold the batch size {first}"
    return ""


def is_count(value: Any) -> bool:
    """Whether something is a number of drafted tokens."""
    return _is_whole(value) and value >= 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def closed(ranges: Sequence[Sequence[Any]]) -> list[tuple[int, int, Any]]:
    """Valid ranges in order, each going on to the next one, as vLLM reads gaps between them."""
    ordered = sorted((first, last, value) for first, last, value in ranges)
    ends = [following[0] - 1 for following in ordered[1:]] + [ordered[-1][1]]
    return [(first, end, value) for (first, _, value), end in zip(ordered, ends, strict=True)]
