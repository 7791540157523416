"""`specformer enlarge`: a heavier target with the same output, to measure with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from vllm_specformer.settings import CommandSettings, Directory, Flag, Positive, Spelling

_MULTIPLES = {"K": 10**3, "M": 10**6, "B": 10**9}


def _in_full(value: Any) -> Any:
    """500M as 500,000,000; what is no such text is left to the checks of a whole number."""
    multiple = _MULTIPLES.get(value[-1:].upper()) if isinstance(value, str) else None
    if multiple is None:
        return value
    try:
        return round(float(value[:-1]) * multiple)
    except (ValueError, OverflowError):  # no number, NaN, infinite
        return value


# K, M and B are powers of a thousand; no model has a million billions.
Magnitude = Annotated[
    int,
    BeforeValidator(_in_full),
    Field(ge=1, le=10**15),
    Spelling("N", "a number above 0 such as 500M or 1.5B"),
]
Pair = Annotated[Path, Flag(positional=True)]


class EnlargeSettings(CommandSettings):
    """One heavier pair."""

    target: Pair = Field(description="Directory of a small target.")
    head: Pair = Field(description="Directory of its head.")
    out: Directory = Field(description="Directory for the new target and its head.")
    parameters: Magnitude = Field(
        "500M", validate_default=True, description="Size of the new target, such as 1B."
    )
    layers: Positive = Field(16, description="Layers of the new target.")


SETTINGS = EnlargeSettings


def run(settings: EnlargeSettings) -> int:
    """Make the pair, or find it made; exit code 0."""
    from vllm_specformer.bench.enlarge import enlarge

    pair = enlarge(
        settings.target, settings.head, settings.out, settings.parameters, layers=settings.layers
    )
    print(f"{pair.target}: {pair.parameters:,} parameters, the same output as {settings.target}")
    print(f"{pair.head}: {settings.head} for it")
    return 0
