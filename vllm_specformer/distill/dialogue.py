"""One conversation on its way: which request comes next, and what the answers make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_specformer.data.manifest import Sampling
from vllm_specformer.data.prompts import Prompt, derive
from vllm_specformer.data.shards import Conversation
from vllm_specformer.distill.encode import Encoder, TemplateRefusedError

TOO_LONG = "prompt longer than the context"
EMPTY = "prompt without a token"
TEMPLATE = "refused by the chat template"
ANSWER_CUT = "answer reached the maximum length"
SEED_BITS = 31  # what every server takes


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


class Dialogue:
    """Grows by the target's answers until no turn is left, or none can follow.

    Attributes:
        skipped: why there is no answer at all.
        cut: why later turns are missing.
    """

    def __init__(self, prompt: Prompt, encoder: Encoder, sampling: Sampling, context: int) -> None:
        self.prompt = prompt
        self.encoder = encoder
        self.sampling = sampling
        self.context = context
        self.temperature = temperature_of(prompt.id, sampling)
        self.skipped: str | None = None
        self.cut: str | None = None
        self.reason = ""
        self._ids: list[int] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._finish = ""
        self._turn = 0
        self._turns = prompt.turns
        self._closed = False
        try:
            opening = (
                encoder.text(prompt.text)
                if prompt.text is not None
                else encoder.opening(self._turns[0], prompt.tools)
            )
        except TemplateRefusedError as error:
            self.refuse(TEMPLATE, str(error))
        else:
            self._extend(opening)

    @property
    def is_open(self) -> bool:
        return not self._closed

    @property
    def missing_turns(self) -> int:
        """Turns without an answer."""
        return self.prompt.num_turns - self._turn

    def request(self) -> Request:
        """What to ask next; only while the dialogue is open."""
        greedy = self.temperature == 0
        seed = derive(self.sampling.seed, "answer", self.prompt.id, self._turn)
        return Request(
            prompt_ids=list(self._ids),
            temperature=self.temperature,
            top_p=1.0 if greedy else self.sampling.top_p,
            max_tokens=min(self.sampling.max_tokens, self.context - len(self._ids)),
            seed=None if greedy else seed % 2**SEED_BITS,
        )

    def accept(self, answer: Answer) -> None:
        """Add the answer to `request()` and open the next turn, if one can follow."""
        self._starts.append(len(self._ids))
        self._ids += answer.token_ids
        self._ends.append(len(self._ids))
        self._finish = answer.finish_reason
        self._turn += 1
        if self._turn >= self.prompt.num_turns:
            self._closed = True
        elif answer.finish_reason == "length":
            self.refuse(ANSWER_CUT)
        else:
            self._next_turn()

    def refuse(self, why: str, reason: str = "") -> None:
        """End here: skipped if there is no answer yet, else cut."""
        self._closed = True
        self.reason = reason
        if self._turn:
            self.cut = why
        else:
            self.skipped = why

    def row(self) -> Conversation | None:
        """The conversation so far; None when skipped."""
        if self.skipped:
            return None
        spans = [(s, e) for s, e in zip(self._starts, self._ends, strict=True) if e > s]
        return Conversation(
            id=self.prompt.id,
            input_ids=self._ids,
            answer_starts=[start for start, _ in spans],
            answer_ends=[end for _, end in spans],
            temperature=self.temperature,
            finish_reason=self._finish,
        )

    def _next_turn(self) -> None:
        try:
            between = self.encoder.following(self._turns[: self._turn + 1], self.prompt.tools)
        except TemplateRefusedError as error:
            self.refuse(TEMPLATE, str(error))
            return
        last = self._ids[-1] if self._ends[-1] > self._starts[-1] else None
        if between and between[0] == last:
            between = between[1:]
        elif last in self.encoder.end_ids and self._fits(len(between) - 1):
            # The template ends answers another way, so the target would not see this token here.
            self._ids.pop()
            self._ends[-1] -= 1
        self._extend(between)

    def _extend(self, ids: Sequence[int]) -> None:
        if not self._fits(len(ids)):
            self.refuse(TOO_LONG)
        elif not self._ids and not ids:
            self.refuse(EMPTY)
        else:
            self._ids += ids

    def _fits(self, more: int) -> bool:
        """Whether at least one token of an answer has room behind so many more."""
        return len(self._ids) + more < self.context


def temperature_of(prompt_id: int, sampling: Sampling) -> float:
    """The temperature of a conversation: a fixed share of the prompts gets the other one."""
    drawn = derive(sampling.seed, "temperature", prompt_id) / 2**63
    return sampling.sampled_temperature if drawn < sampling.sampled_share else sampling.temperature
