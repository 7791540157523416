"""What is compared: no speculation, SpecFormer in several ways, and vLLM's own methods."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.places import lasting_model

NONE, SCHEDULE, CONFIDENT, TREE = "none", "schedule", "confident", "tree"
AGAIN = "again"  # a second server without speculation: how far apart equal servers come out
TREE_NODES = 16  # of the arm `tree` where no plan says better
Schedule = list[list[int]]
# Methods of vLLM that need no trained head; K is theirs to choose in `--speculative-config`.
_UNTRAINED: dict[str, dict[str, Any]] = {
    "ngram": {
        "method": "ngram",
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 3,
        "num_speculative_tokens": 4,
    },
    "suffix": {"method": "suffix", "num_speculative_tokens": 16},
}


@dataclass(frozen=True)
class Arm:
    """A server's name in tables and its `--speculative-config`, None for no speculation."""

    name: str
    speculative: dict[str, Any] | None


def default_names(
    counts: Sequence[int],
    schedule: Schedule | None,
    confident: dict[str, Any] | None = None,
    tree: dict[str, Any] | None = None,
) -> list[str]:
    """Every arm that can run here, trees among them where a plan has them."""
    names = [NONE, *(f"k{count}" for count in counts)]
    names += [SCHEDULE] if schedule else []
    names += [CONFIDENT] if confident else []
    names += [TREE] if tree else []
    names += ["ngram"]
    return [*names, "suffix"] if importlib.util.find_spec("arctic_inference") else names


def build(
    names: Sequence[str],
    head: str,
    slots: int,
    schedule: Schedule | None,
    others: Mapping[str, dict[str, Any]],
    confident: dict[str, Any] | None = None,
    tree: dict[str, Any] | None = None,
) -> list[Arm]:
    """The arms of these names in this order, without speculation first, then `others`.

    Args:
        slots: the most tokens the head drafts.
        others: further speculative configs by name.
        confident: a plan's config with drafts cut by confidence.
        tree: a plan's config with trees; without one the arm has `TREE_NODES` at every batch size.

    Raises:
        SpecFormerError: unknown name, K beyond the head's slots, a schedule that is missing.
    """
    chosen = list(dict.fromkeys([NONE, *names]))
    for name in others:
        if name in chosen:
            raise SpecFormerError(
                f"--speculative-config {name}=...: --arms has it already", "choose another name"
            )
    if CONFIDENT in chosen and confident is None:
        raise SpecFormerError(
            "--arms confident: needs --schedule, a plan that `specformer plan --json` measured"
        )
    plain_tree = {"method": "specformer", "model": head, "tree_nodes": TREE_NODES}
    known = {CONFIDENT: confident, TREE: tree or plain_tree}
    arms = [
        Arm(name, known[name] if name in known else _speculative(name, head, slots, schedule))
        for name in chosen
    ]
    return arms + [Arm(name, lasting_model(dict(config))) for name, config in others.items()]


def _speculative(
    name: str, head: str, slots: int, schedule: Schedule | None
) -> dict[str, Any] | None:
    if name in (NONE, AGAIN):
        return None
    if name in _UNTRAINED:
        if name == "suffix" and not importlib.util.find_spec("arctic_inference"):
            raise SpecFormerError("--arms suffix: vLLM needs the package arctic-inference for it")
        return _UNTRAINED[name]
    ours = {"method": "specformer", "model": head}
    if name == SCHEDULE:
        if not schedule:
            raise SpecFormerError(
                "--arms schedule: needs --schedule, a plan that `specformer plan --json` wrote"
            )
        most = max(count for _, _, count in schedule)
        # vLLM wants a K above 0 beside the schedule, also if that never drafts.
        return ours | {
            "num_speculative_tokens": max(1, most),
            "num_speculative_tokens_per_batch_size": schedule,
        }
    if name[:1] == "k" and name[1:].isdigit():
        if not 1 <= int(name[1:]) <= slots:
            raise SpecFormerError(f"--arms {name}: this head drafts 1 to {slots} tokens")
        return ours | {"num_speculative_tokens": int(name[1:])}
    known = ", ".join(
        [NONE, AGAIN, "k1 ... k" + str(slots), SCHEDULE, CONFIDENT, TREE, *_UNTRAINED]
    )
    raise SpecFormerError(
        f"--arms {name}: unknown", f"choose from {known}, or add it with --speculative-config"
    )
