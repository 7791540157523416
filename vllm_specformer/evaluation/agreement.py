"""Do offline replay and real engine agree, step by step?

The replay takes the engine's own answers, so both sides speak about the same text, and text decides
what is accepted (see `replay.py`). Both are counted by the same code: what the engine accepted
behind a position stands in for the drafts there. A step is a bonus token and what is accepted
behind it, so the first step's bonus token is the one that the prompt's own step emits, and a bonus
token that ends the answer is a step without drafts. Nothing counts past an answer's end. Only
drafts that differ can make the two sides differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_specformer.evaluation.replay import HEAD, DraftedText, replay
from vllm_specformer.evaluation.served import Served
from vllm_specformer.training.acceptance import Acceptance

TOLERANCE = 0.02
# In 32-bit arithmetic only near-ties differ between two correct implementations.
SAME_STEPS_IN_FP32 = 0.99


_NO_TOKEN = -1


@dataclass(frozen=True)
class Step:
    """What the engine accepted in one step, and what it would have of the dense head's drafts.

    `position` is that of the last token the target had seen, one before the bonus token.
    """

    text: DraftedText
    position: int
    accepted: int
    expected: int


@dataclass(frozen=True)
class Agreement:
    """Both sides at one temperature and number of drafted tokens.

    Attributes:
        same_steps: share of the engine's steps that accepted as many tokens as they would have of
            the dense head's drafts, made where the step stood.
        own_words: share of greedy answer tokens that the offline target, too, finds most probable;
            None for sampled answers.
        first: the first step that accepted another number of tokens.
    """

    num_tokens: int
    temperature: float
    answers: int
    offline: Acceptance
    engine: Acceptance
    same_steps: float
    own_words: float | None
    first: Step | None

    @property
    def difference(self) -> float:
        """Engine over offline tokens per step, less one."""
        return self.engine.tokens_per_step / self.offline.tokens_per_step - 1

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= TOLERANCE

    def is_clean(self, dtype: str) -> bool:
        """Whether nothing is left to explain: a mistake that this head hardly minds shows too."""
        return self.agrees and (dtype != "float32" or self.same_steps >= SAME_STEPS_IN_FP32)


def compare(served: Served, drafted: Mapping[int, DraftedText]) -> Agreement:
    """Hold an engine's steps against the dense head's drafts on the engine's answers.

    Args:
        drafted: the engine's answers by number, with drafts for `served.num_tokens`. Answers of one
            token, which leave nothing to draft, may be missing.
    """
    count = served.num_tokens
    steps = list(engine_steps(served, drafted))
    differing = [step for step in steps if step.accepted != step.expected]
    return Agreement(
        num_tokens=count,
        temperature=served.temperature,
        answers=len(drafted),
        offline=replay(drafted.values(), HEAD, count),
        engine=_engine(steps, drafted, count),
        same_steps=1 - len(differing) / max(1, len(steps)),
        own_words=None if served.temperature else _own_words(drafted),
        first=differing[0] if differing else None,
    )


def engine_steps(served: Served, drafted: Mapping[int, DraftedText]) -> Iterator[Step]:
    """Every step of the engine that verified drafts, beside what it would have accepted of ours."""
    for number, text in drafted.items():
        start, end = text.answers[0]
        position, drafts = start - 1, text.drafts[served.num_tokens]
        for emitted in served.steps[number]:
            truth = text.tokens[position + 2 : end]
            if not truth:
                break
            expected = _common(drafts[position], truth)
            yield Step(text, position, min(emitted - 1, len(truth)), expected)
            position += emitted


def _engine(steps: Sequence[Step], drafted: Mapping[int, DraftedText], count: int) -> Acceptance:
    """The engine's acceptance: at each of its steps what it accepted, and then a wrong draft."""
    accepted = {(step.text.id, step.position): step.accepted for step in steps}
    acceptance = Acceptance(count)
    for number, text in drafted.items():
        start, end = text.answers[0]

        def drafts(position: int, number: int = number, text: DraftedText = text) -> list[int]:
            matched = accepted.get((number, position), 0)
            right = text.tokens[position + 2 : position + 2 + matched]
            return right + [_NO_TOKEN] * (count - matched)

        acceptance.walk(text.tokens[:end], start, drafts)
    return acceptance


def _common(drafts: Sequence[int], truth: Sequence[int]) -> int:
    """Length of the common beginning."""
    matched = 0
    for draft, token in zip(drafts, truth, strict=False):
        if draft != token:
            break
        matched += 1
    return matched


def _own_words(drafted: Mapping[int, DraftedText]) -> float:
    same = total = 0
    for text in drafted.values():
        for start, end in text.answers:
            said = zip(text.tokens[start:end], text.best[start - 1 : end - 1], strict=True)
            same += sum(token == best for token, best in said)
            total += end - start
    return same / max(1, total)
