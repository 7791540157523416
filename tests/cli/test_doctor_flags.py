"""`specformer doctor`: its only flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_flags(typed: Callable[..., Any]) -> None:
    assert typed("doctor").model_dump() == {"as_json": False}
    assert typed("doctor", "--json").model_dump() == {"as_json": True}
