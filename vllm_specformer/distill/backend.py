"""What a run asks of whatever generates the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_specformer.distill.dialogue import Dialogue
from vllm_specformer.errors import SpecFormerError


class EngineError(SpecFormerError):
    """The engine cannot be started, reached or used."""


class Progress(Protocol):
    """Who wants to know how far an engine has come."""

    def answered(self, answers: int, tokens: int) -> None:
        """So many more answers and tokens."""


class Engine(Protocol):
    """Something that continues token ids as the target does."""

    context: int
    versions: dict[str, str]

    def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
        """Carry every dialogue to its end."""
