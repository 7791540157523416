"""Drafts that end where the head is no longer sure of them.

At a large batch every drafted token is a row that the target pays for. The head's own
probabilities say which are worth it: each slot's largest one, through the head's calibration if it
has one, is the chance of its draft, and their product up to a slot the chance that the draft is
accepted that far. From the first slot on whose product is below the threshold nothing is drafted.

The number of drafts must not tell what was sampled: verification assumes that a draft comes from
its distribution, whatever its value. So a slot's largest probability counts, never that of the
token drawn in it. Here, on the V1 runner, a step's own chances decide, and no two steps' drafts
meet the same noise; so they may follow the tokens drawn before a slot. `cut_v2.py` is for V2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_specformer.calibration import Calibrations, largest_log_odds
from vllm_specformer.engine.model import head_config
from vllm_specformer.engine.speculative_config import (
    CONFIDENCE,
    Thresholds,
    confidence_ranges,
    threshold_at,
)
from vllm_specformer.errors import SpeculativeConfigError


class ConfidenceCut:
    """Thresholds by batch size; beyond the last range its threshold goes on."""

    def __init__(self, ranges: Thresholds, curves: Calibrations) -> None:
        self.ranges, self.curves = ranges, curves

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
                "add --no-async-scheduling, take the V2 runner, or leave the field out",
            )
        config = head_config(vllm_config.speculative_config.draft_model_config.hf_config)
        return cls(ranges, Calibrations.of(config))

    def shorten(
        self, tokens: Tensor, logits: Tensor, temperature: Tensor | None
    ) -> list[list[int]]:
        """Each request's drafts up to the first that is not sure enough.

        Args:
            tokens: drafts, int64 [R, n].
            logits: of their slots, float32 [R, n, V or N].
            temperature: of the requests, float32 [R], 0 for greedy; None if all are.
        """
        if temperature is None:
            odds = self.curves.greedy.log_odds(largest_log_odds(logits))
        else:
            is_sampled = (temperature > 0)[:, None]
            heat = torch.where(is_sampled, temperature[:, None], 1.0)[..., None]
            raw = largest_log_odds(logits / heat)
            greedy, sampled = (curve.log_odds(raw) for curve in self.curves)
            odds = torch.where(is_sampled, sampled, greedy)
        chances = odds.sigmoid().cumprod(1)
        kept = (chances >= threshold_at(self.ranges, len(tokens))).sum(1)  # they fall
        return [row[:n] for row, n in zip(tokens.tolist(), kept.tolist(), strict=True)]
