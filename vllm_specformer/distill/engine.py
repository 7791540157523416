"""What a run asks of whatever generates the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from vllm_specformer.errors import SpecFormerError

if TYPE_CHECKING:
    from vllm_specformer.distill.dialogue import Dialogue


class EngineError(SpecFormerError):
    """The engine cannot be started, reached or used."""


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and how to continue it; `seed` is None where nothing is drawn."""

    prompt_ids: list[int]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


@dataclass(frozen=True)
class Answer:
    """Generated tokens, the end token included."""

    token_ids: Sequence[int]
    finish_reason: Literal["stop", "length"]


class Progress(Protocol):
    """Who wants to know how far an engine has come."""

    def answered(self, answers: int, tokens: int, speed: str | None = None) -> None:
        """So many more answers and tokens; `speed` where tokens are counted later."""


class Engine(Protocol):
    """Something that continues token ids as the target does."""

    context: int
    versions: dict[str, str]

    def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
        """Carry every dialogue to its end."""
