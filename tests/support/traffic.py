"""What many different users might ask of a server at once, from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from support.engines import prompts

# Shared beginnings, so that the prefix cache is hit.
PREFIXES = ("", "", "", "import os\nimport sys\n\n\n", "\n\n\n".join(prompts()[60:63]) + "\n\n\n")
LENGTHS = (1, 2, 8, 16, 24, 32, 48, 64)
STOPS: tuple[list[str] | None, ...] = (None, None, None, ["return"], ["\n\n", "self"], [")"])
# One in so many greedy requests is repeated from a small stock whose answers are known.
STOCK = 120


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        settings: names as in the OpenAI API and in vLLM's `SamplingParams` alike.
        leaves_after: tokens after which the client goes away; None: it stays to the end.
        known: index of the greedy answer in the stock; None: sampled, so there is none.
    """

    prompt: str
    settings: dict[str, Any]
    priority: int
    leaves_after: int | None
    known: int | None


@dataclass(frozen=True)
class Greedy:
    """A greedy request whose answer without speculation is to be known."""

    prompt: str
    settings: dict[str, Any]


def stock(size: int = STOCK) -> list[Greedy]:
    """The greedy requests of the traffic, always the same."""
    rng = random.Random(1)
    return [
        Greedy(_prompt(rng), {"temperature": 0.0, **_settings(rng, penalties=True)})
        for _ in range(size)
    ]


def traffic(seed: int, known: Sequence[Greedy]) -> Iterator[Ask]:
    """Requests without end: greedy and sampled, short and long, patient and not."""
    rng = random.Random(seed)
    while True:
        leaves_after = rng.randint(0, 12) if rng.random() < 0.12 else None
        priority = rng.randint(0, 3)
        if rng.random() < 0.65:
            index = rng.randrange(len(known))
            greedy = known[index]
            yield Ask(greedy.prompt, greedy.settings, priority, leaves_after, index)
        else:
            settings = {"temperature": rng.choice((0.3, 0.8, 1.0, 1.5)), **_settings(rng)}
            settings |= rng.choice(({}, {"seed": rng.randrange(99)}, {"top_k": 20}, {"top_p": 0.9}))
            yield Ask(_prompt(rng), settings, priority, leaves_after, None)


def _prompt(rng: random.Random) -> str:
    return rng.choice(PREFIXES) + rng.choice(prompts())


def _settings(rng: random.Random, penalties: bool = False) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_tokens": rng.choice(LENGTHS)}
    if (stop := rng.choice(STOPS)) is not None:
        settings["stop"] = stop
    if rng.random() < 0.2:
        settings["ignore_eos"] = True
    if rng.random() < 0.1:
        settings["min_tokens"] = min(6, settings["max_tokens"])
    if penalties and rng.random() < 0.2:
        settings["presence_penalty"] = 1.0
    return settings
