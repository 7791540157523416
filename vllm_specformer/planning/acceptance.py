"""Tokens per step by number of drafted tokens, out of what `specformer eval --json` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_specformer.errors import SpecFormerError

# What sampled requests get, in a file that knows of it.
_DRAWN = "head_drawn"
# A tree of so many nodes.
_NODES = "n="


def from_evaluation(
    path: Path, counts: Sequence[int], temperature: float = 0.0
) -> dict[int, float]:
    """Tokens per step at each of `counts`, 1 at a count of 0.

    A count that was not evaluated is taken from the next larger one: the drafts it would have kept.

    Raises:
        SpecFormerError: no such file, another kind of file, or nothing about these counts.
    """
    evaluated = _by_count(path, temperature)
    return {count: 1.0 if count == 0 else _at(evaluated, count, path) for count in counts}


def from_shares(shares: Sequence[float], counts: Sequence[int]) -> dict[int, float]:
    """Tokens per step at each of `counts`, of the share of drafts accepted up to each position.

    Raises:
        SpecFormerError: shares that rise, or fewer than the largest count.
    """
    if list(shares) != sorted(shares, reverse=True):
        raise SpecFormerError(
            f"--accepted {' '.join(f'{share:g}' for share in shares)}: no later position can be "
            "reached more often",
            "give the share of drafts accepted up to position 1, 2, ...",
        )
    if len(shares) < max(counts):
        raise SpecFormerError(
            f"--accepted: has {len(shares)} positions, and --num-speculative-tokens asks for "
            f"{max(counts)}"
        )
    return {count: 1.0 + sum(shares[:count]) for count in counts}


def trees_of_evaluation(path: Path) -> dict[float, dict[int, float]]:
    """Tokens per step of trees by number of nodes, by temperature; empty where none were replayed.

    Raises:
        SpecFormerError: no such file, or another kind of file.
    """
    return {
        group["temperature"]: {
            int(name.removeprefix(_NODES)): row["tokens_per_step"]
            for name, row in group["trees"].items()
            if name.startswith(_NODES)
        }
        for group in _groups(path)
        if "trees" in group
    }


def kept_of_evaluation(path: Path, temperature: float) -> dict[int, list[float]]:
    """Share of accepted drafts among the likeliest, by number of drafts; see planning/adaptive.py.

    Empty where the evaluation was made without `--likeliest`.

    Raises:
        SpecFormerError: no such file, or another kind of file.
    """
    for group in _groups(path):
        if group["temperature"] == round(temperature, 4):
            kept = group.get("kept_of_likeliest", {})
            return {int(k.removeprefix("K=")): shares for k, shares in kept.items()}
    return {}


def _at(evaluated: dict[int, dict[str, Any]], count: int, path: Path) -> float:
    if count in evaluated:
        return float(evaluated[count]["tokens_per_step"])
    larger = [known for known in evaluated if known > count]
    if not larger:
        raise SpecFormerError(
            f"--eval {path}: has no figures for {count} drafted tokens or more",
            f"run `specformer eval` with --num-speculative-tokens {count}",
        )
    shares = evaluated[min(larger)]["acceptance_per_position"]
    return 1.0 + float(sum(shares[:count]))


def _groups(path: Path) -> list[dict[str, Any]]:
    """What the file says of each temperature."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SpecFormerError(f"--eval {path}: not readable as JSON ({error})") from None
    groups = content.get("offline") if isinstance(content, dict) else None
    if not isinstance(groups, dict):
        raise SpecFormerError(f"--eval {path}: not what `specformer eval --json` writes")
    return list(groups.values())


def _by_count(path: Path, temperature: float) -> dict[int, dict[str, Any]]:
    groups = _groups(path)
    for group in groups:
        if group["temperature"] == round(temperature, 4):
            methods = group["all"]
            served = methods.get(_DRAWN, methods["head"])
            return {int(k.removeprefix("K=")): row for k, row in served.items()}
    known = ", ".join(f"{group['temperature']:g}" for group in groups)
    raise SpecFormerError(
        f"--temperature {temperature:g}: --eval {path} has temperature {known} only"
    )
