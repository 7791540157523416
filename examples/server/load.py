"""Send prompts to running servers through the `openai` client and time them, in pairs."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Service:
    """A model behind a server, and how it is asked: by chat, or to continue a text."""

    url: str
    model: str
    chat: bool
    max_tokens: int = 128

    def question(self, prompt: str) -> dict[str, Any]:
        """The request without how it is sampled."""
        asked = {"messages": [{"role": "user", "content": prompt}]}
        return {
            "model": self.model,
            "max_tokens": self.max_tokens,
            **(asked if self.chat else {"prompt": prompt}),
        }

    def endpoint(self, client: Any) -> Any:
        return client.chat.completions if self.chat else client.completions


@dataclass(frozen=True)
class Completion:
    prompt: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """The same prompts once at one concurrency."""

    seconds: float
    completions: tuple[Completion, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(len(c.token_ids) for c in self.completions) / self.seconds


@dataclass(frozen=True)
class PairedRounds:
    """Rounds with and without speculation, taken in turn so that noise hits both alike."""

    with_drafts: tuple[Round, ...]
    without: tuple[Round, ...]

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Medians (with, without)."""
        with_drafts, without = (
            statistics.median(r.tokens_per_second for r in rounds)
            for rounds in (self.with_drafts, self.without)
        )
        return with_drafts, without

    @property
    def ratios(self) -> list[float]:
        """With over without, one per pair."""
        return [
            a.tokens_per_second / b.tokens_per_second
            for a, b in zip(self.with_drafts, self.without, strict=True)
        ]

    @property
    def is_noisy(self) -> bool:
        """Whether ratios lie more than half apart: something else took the machine's time."""
        return max(self.ratios) > 1.5 * min(self.ratios)

    def differing_prompts(self) -> list[str]:
        """Prompts whose tokens are not the same in every round of both servers."""
        outputs: dict[str, set[tuple[int, ...]]] = {}
        for one_round in (*self.with_drafts, *self.without):
            for completion in one_round.completions:
                outputs.setdefault(completion.prompt, set()).add(completion.token_ids)
        return [prompt for prompt, seen in outputs.items() if len(seen) > 1]


def read_prompts(path: Path) -> list[str]:
    """Texts to be continued, or what a user asks first in each chat."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]


def stream(service: Service, prompt: str, on_text: Callable[[str], None]) -> None:
    """One greedy answer; `on_text` gets each piece as it arrives."""
    with OpenAI(**_client_options(service)) as client:
        for chunk in service.endpoint(client).create(
            **service.question(prompt), temperature=0, stream=True
        ):
            choice = chunk.choices[0]
            on_text((choice.delta.content or "") if service.chat else choice.text)


def complete(
    service: Service,
    prompts: Sequence[str],
    concurrency: int,
    on_completion: Callable[[Completion], None] = lambda completion: None,
    temperature: float = 0.0,
) -> Round:
    """Answer all prompts, at most `concurrency` at a time; timed as a whole."""
    return asyncio.run(_complete(service, prompts, concurrency, on_completion, temperature))


async def _complete(
    service: Service,
    prompts: Sequence[str],
    concurrency: int,
    on_completion: Callable[[Completion], None],
    temperature: float,
) -> Round:
    slots = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(**_client_options(service)) as client:

        async def one(prompt: str) -> Completion:
            async with slots:
                answer = await service.endpoint(client).create(
                    **service.question(prompt),
                    temperature=temperature,
                    extra_body={"return_token_ids": True},
                )
            choice = answer.choices[0]
            token_ids = tuple((choice.model_extra or {})["token_ids"])
            text = choice.message.content if service.chat else choice.text
            completion = Completion(prompt, text, token_ids)
            on_completion(completion)
            return completion

        started = time.perf_counter()
        completions = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return Round(time.perf_counter() - started, tuple(completions))


def _client_options(service: Service) -> dict[str, Any]:
    return {
        "base_url": f"{service.url}/v1",
        "api_key": "none",
        "timeout": REQUEST_TIMEOUT_S,
        "max_retries": 0,
    }


def in_pairs(
    with_drafts: Callable[[], Round], without: Callable[[], Round], rounds: int
) -> PairedRounds:
    """Alternate the two, and which of them goes first."""
    pairs = []
    for index in range(rounds):
        if index % 2 == 0:
            first = with_drafts()
            pairs.append((first, without()))
        else:
            first = without()
            pairs.append((with_drafts(), first))
    return PairedRounds(*(tuple(side) for side in zip(*pairs, strict=True)))
