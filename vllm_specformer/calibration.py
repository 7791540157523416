"""How probably a slot's draft is accepted, by the head's largest probability in that slot.

That probability tells how sure the head is, not how often it is right. A calibration is a logistic
curve per slot between the two: few parameters, so that some dozens of texts fix them.
`specformer eval --calibrate` fits it, the head's config.json keeps it, and it is used where drafts
that are not worth verifying are left out (docs/confidence.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vllm_specformer.config import SpecFormerConfig

# log(q / (1 - q)) of a probability is kept within these, as vLLM's estimator keeps it.
MOST_LOG_ODDS = 40.0


class Calibration(NamedTuple):
    """chance = sigmoid(slope * log-odds of the largest probability + intercept of the slot)."""

    slope: float
    intercepts: tuple[float, ...]

    @classmethod
    def none(cls, slots: int) -> Calibration:
        """The probability itself."""
        return cls(1.0, (0.0,) * slots)

    @classmethod
    def of_field(cls, values: Sequence[float], slots: int) -> Calibration:
        """Out of a field of the head's configuration; empty: the probability itself."""
        return cls(values[0], tuple(values[1:])) if values else cls.none(slots)

    @property
    def field(self) -> tuple[float, ...]:
        """As the head's configuration keeps it: the slope, then the intercepts."""
        return (self.slope, *self.intercepts)

    def log_odds(self, raw: Tensor) -> Tensor:
        """Log-odds of acceptance for log-odds of the largest probability, [..., n <= K]."""
        return self.slope * raw + raw.new_tensor(self.intercepts[: raw.shape[-1]])


class Calibrations(NamedTuple):
    """Of greedy requests, and of those whose drafts are drawn."""

    greedy: Calibration
    sampled: Calibration

    @classmethod
    def of(cls, config: SpecFormerConfig) -> Calibrations:
        """A head's; the probability itself where it has none."""
        slots = config.num_draft_slots
        return cls(
            Calibration.of_field(config.acceptance_calibration, slots),
            Calibration.of_field(config.acceptance_calibration_sampled, slots),
        )


def largest_log_odds(logits: Tensor) -> Tensor:
    """log(q / (1 - q)) of the largest probability q of each row: logits [..., V] -> float32 [...].

    Over the sum of all tokens but the likeliest, which is exact where q is nearly 1; as vLLM's
    estimator computes it.
    """
    scores = logits.float()
    rest = (scores - scores.amax(-1, keepdim=True)).exp().sum(-1) - 1
    return -rest.clamp(min=0).log().clamp(-MOST_LOG_ODDS, MOST_LOG_ODDS)
