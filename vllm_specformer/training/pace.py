"""How a run spends its time: the clock of --max-hours, the forecast, what evaluations may take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.training.settings import COSINE_FLOOR, DECAY_SHARE

EVALUATIONS = 10  # in a run, where nobody says otherwise
EVALUATION_SHARE = 0.1  # of a run's time, at most
# Seconds of training after which a forecast is worth telling, and between checkpoints by the clock.
FORECAST_AFTER, BETWEEN_CHECKPOINTS = 60.0, 600.0
_BACKWARD = 2  # times the work of the forward pass


class Clock:
    """Seconds that a run has taken, its earlier parts included, against its limit.

    `limit`: seconds; None: none. `agree` makes one number of all processes' numbers, so that all
    stop in the same step.
    """

    def __init__(self, limit: float | None, agree: Callable[[float], float] = lambda x: x) -> None:
        self.limit, self.agree = limit, agree
        self.reached = 0.0  # of the limit, when it was last asked for
        self.evaluated, self.last_evaluation = 0.0, 0.0
        self._before, self._since = 0.0, time.monotonic()

    def start(self, before: float, evaluated: float) -> None:
        """Begin to count, behind so many seconds of earlier parts and their evaluations."""
        self._before, self._since, self.evaluated = before, time.monotonic(), evaluated

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._since

    def advance(self) -> float:
        """The share of the limit that is used up, with time kept for the last evaluation."""
        if self.limit is not None:
            self.reached = self.agree((self.seconds + self.last_evaluation) / self.limit)
        return self.reached

    @property
    def over(self) -> bool:
        return self.limit is not None and self.reached >= 1

    def evaluation_took(self, seconds: float) -> None:
        self.last_evaluation = self.agree(seconds)
        self.evaluated += self.last_evaluation

    def may_evaluate(self, expected: float) -> bool:
        """Whether one more evaluation leaves enough of their share for the last one.

        Args:
            expected: seconds that an evaluation takes, where none has been timed.
        """
        one = self.last_evaluation or self.agree(expected)
        return self.limit is not None and (
            self.evaluated + 2 * one <= EVALUATION_SHARE * self.limit
        )


def factor(shape: str, progress: float, warmup: float) -> float:
    """The learning rate as a share of the highest, by the progress of the run from 0 to 1."""
    if progress < warmup:
        return progress / warmup
    if shape == "constant":
        return 1.0
    left = max(0.0, 1 - progress)
    if shape == "trapezoid":
        return 0.5 * (1 - math.cos(math.pi * min(1.0, left / DECAY_SHARE)))
    if shape == "linear":
        return left / (1 - warmup)
    wave = 0.5 * (1 + math.cos(math.pi * (1 - left / (1 - warmup))))
    return COSINE_FLOOR + (1 - COSINE_FLOOR) * wave


@dataclass(frozen=True)
class Work:
    """Multiplications of a training step and of the evaluation of one text, on average."""

    step: float
    evaluated_text: float

    @classmethod
    def of(
        cls,
        config: SpecFormerConfig,
        target_parameters: int,
        *,
        tokens: float,
        texts: float,
        anchors: float,
        trained_anchors: float,
        slots: float,
        scored: int,
        budgets: tuple[int, ...],
    ) -> Work:
        """
        Args:
            tokens: of a text.
            texts: in a step.
            anchors: of a text; `trained_anchors` of them are drawn in training.
            slots: that a training step runs.
            scored: tokens that it scores, of those of the head.
            budgets: numbers of drafted tokens that are evaluated.
        """
        size = config.hidden_size
        layer = 4 * size * size + 3 * size * config.intermediate_size
        layers = config.num_slot_layers * layer
        slot = layers + size * config.num_scored_tokens
        trained_slot = layers + size * min(scored, config.num_scored_tokens)
        target = tokens * target_parameters
        run = sum(k if config.nested_slots else config.num_draft_slots for k in budgets)
        trained = min(anchors, trained_anchors) * slots * (1 + _BACKWARD)
        return cls(texts * (target + trained * trained_slot), target + anchors * run * slot)

    def most_texts(self, steps_between: float) -> int:
        """Texts that may be evaluated after so many steps each time; at least one."""
        return max(1, int(EVALUATION_SHARE * steps_between * self.step / self.evaluated_text))


def in_words(seconds: float) -> str:
    """A time as one would tell it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def forecast(done: int, steps: int, per_step: float, clock: Clock, evaluates: bool) -> str:
    """What is to be expected of a run, from its first minute.

    Args:
        done, steps: steps that are behind it, and of the whole run.
        per_step: seconds that one takes.
    """
    left = (steps - done) * per_step
    extra = 1 + EVALUATION_SHARE * evaluates
    line = f"forecast: {steps - done:,} steps to go at {per_step:.2g} s each"
    if clock.limit is not None and left * extra > clock.limit - clock.seconds:
        fits = int((clock.limit - clock.seconds) / extra / per_step)
        return (
            f"{line}; about {done + fits:,} of {steps:,} fit into --max-hours, the learning rate "
            f"falls accordingly; done in {in_words(clock.limit - clock.seconds)}"
        )
    evaluations = ", and up to a tenth more for evaluations" if evaluates else ""
    return f"{line}: {in_words(left)}{evaluations}"
