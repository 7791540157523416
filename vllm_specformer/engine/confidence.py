"""Drafts that end where the head is no longer sure of them.

At a large batch every drafted token is a row that the target pays for. The head's own
probabilities say which are worth it: the product of its largest ones up to a slot estimates the
chance that the draft is accepted that far. From the first slot on whose product is below the
threshold nothing is drafted.

The number of drafts must not tell what was sampled: verification assumes that a draft comes from
its distribution, whatever its value. So a slot's largest probability counts, never that of the
token drawn in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_specformer.engine.speculative_config import CONFIDENCE, confidence_ranges
from vllm_specformer.errors import SpeculativeConfigError


class ConfidenceCut:
    """Thresholds by batch size; beyond the last range its threshold goes on."""

    def __init__(self, ranges: Sequence[tuple[int, int, float]]) -> None:
        self.ranges = ranges

    @classmethod
    def of(cls, vllm_config: Any) -> ConfidenceCut | None:
        """What the speculative config asks for, None where it asks for nothing.

        Raises:
            SpeculativeConfigError: the engine schedules the next step before drafts are known.
        """
        ranges = confidence_ranges(vllm_config.speculative_config)
        if ranges is None:
            return None
        if vllm_config.scheduler_config.async_scheduling:
            raise SpeculativeConfigError(
                f"speculative config: {CONFIDENCE} lets the drafts decide how many rows the next "
                "step has, and asynchronous scheduling plans that step before they are known",
                "add --no-async-scheduling, or leave the field out",
            )
        return cls(ranges)

    def at(self, batch: int) -> float:
        """The threshold for a step of so many requests."""
        return next((bar for _, last, bar in self.ranges if batch <= last), self.ranges[-1][2])

    def shorten(self, tokens: Tensor, largest: Tensor) -> list[list[int]]:
        """Each request's drafts up to the first that is not sure enough.

        Args:
            tokens: drafts, int64 [R, n].
            largest: log of the largest probability of each slot, float32 [R, n].
        """
        probability = largest.cumsum(1).exp()
        kept = (probability >= self.at(len(tokens))).sum(1)  # it falls from slot to slot
        return [row[:n] for row, n in zip(tokens.tolist(), kept.tolist(), strict=True)]


def largest_log_probs(logits: Tensor) -> Tensor:
    """Log of the largest probability in each row of logits [rows, V], float32 [rows]."""
    return logits.amax(-1) - torch.logsumexp(logits, -1)


def check_no_cut(speculative_config: Any) -> None:
    """Refuse a threshold on the V2 runner.

    Raises:
        SpeculativeConfigError: one was asked for.
    """
    if confidence_ranges(speculative_config) is not None:
        raise SpeculativeConfigError(
            f"speculative config: {CONFIDENCE} needs vLLM's V1 model runner, since the steps of V2 "
            "are of a fixed number of drafts, and this engine runs V2",
            "set VLLM_USE_V2_MODEL_RUNNER=0 and --no-async-scheduling, or leave the field out",
        )
