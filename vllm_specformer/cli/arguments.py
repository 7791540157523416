"""Types of command-line arguments: what is wrong with a value is said in one line."""

from __future__ import annotations

import argparse
import json
from typing import Any


def _number(text: str, kind: type, low: float, high: float, wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    return int(_number(text, int, 1, float("inf"), "a whole number above 0"))


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return int(_number(text, int, 0, float("inf"), "a whole number, 0 or more"))


def share(text: str) -> float:
    """A number from 0 to 1."""
    return float(_number(text, float, 0, 1, "a number from 0 to 1"))


def temperature(text: str) -> float:
    """A number from 0 to 2."""
    return float(_number(text, float, 0, 2, "a number from 0 to 2"))


def seconds(text: str) -> float:
    """A number of seconds, 0 or more."""
    return float(_number(text, float, 0, float("inf"), "a number of seconds, 0 or more"))


def top_p(text: str) -> float:
    """A number above 0, at most 1."""
    return float(_number(text, float, 1e-6, 1, "a number above 0, at most 1"))


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}): {text!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text!r}")
    return value


_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def magnitude(text: str) -> int:
    """A whole number above 0, such as 500M; K, M and B are powers of a thousand."""
    digits, unit = (text[:-1], _UNITS.get(text[-1:].upper())) if text else ("", None)
    wanted = "a number above 0 such as 500M or 1.5B"
    if unit is None:
        return int(_number(text, int, 1, float("inf"), wanted))
    return round(_number(digits, float, 1 / unit, 1e6, wanted) * unit)
