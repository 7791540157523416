"""Chances of acceptance on the V2 runner, by the head's own calibration.

vLLM's estimator begins with coefficients of other models and learns one curve for all requests,
greedy and sampled, although they differ: beside each other neither is right
(benchmarks/slot_chances.py). Here the log-odds it learns from are those that the head's calibration
gives, which knows both kinds; so it begins right, and still follows the traffic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.acceptance_estimator import OnlineAcceptanceEstimator

from vllm_specformer.calibration import Calibration, Calibrations
from vllm_specformer.config import SpecFormerConfig


class CalibratedEstimator(OnlineAcceptanceEstimator):
    """vLLM's estimator over calibrated log-odds.

    Args:
        curves: of greedy requests, and of sampled ones.
        learns: whether it goes on learning. If not, chances are those of `curves`.
    """

    def __init__(
        self,
        max_num_reqs: int,
        num_speculative_steps: int,
        device: torch.device,
        curves: Calibrations,
        learns: bool = True,
    ) -> None:
        # One row more: padded rows of a graph have the index -1, and must not meet a request's.
        super().__init__(max_num_reqs + 1, num_speculative_steps, device)
        self.learns = learns
        self.slope.fill_(1.0)
        self.intercepts.zero_()
        slopes = [curve.slope for curve in curves]
        intercepts = [curve.intercepts[:num_speculative_steps] for curve in curves]
        self._slopes = torch.tensor(slopes, dtype=torch.float32, device=device)
        self._intercepts = torch.tensor(intercepts, dtype=torch.float32, device=device)

    def step(self, idx_mapping: Tensor, num_sampled: Tensor, num_rejected: Tensor) -> None:
        """Learn from the target's verdict on the last drafts; arguments as the base class."""
        if self.learns:
            super().step(idx_mapping, num_sampled, num_rejected)

    def predict(
        self,
        logits: Tensor,
        idx_mapping: Tensor,
        draft_step: Tensor,
        confidence_probs: Tensor,
        temperature: Tensor,
    ) -> None:
        """Chances of some slots' drafts into `confidence_probs`; arguments as the base class."""
        super().predict(logits, idx_mapping, draft_step, confidence_probs, temperature)
        count, device = len(logits), logits.device
        # Indices of one element would be read by the host, so a shared slot is spread over rows.
        state, slot = idx_mapping.long(), draft_step.long().expand(count)
        row = torch.arange(count, device=device)
        if draft_step.dim():
            row = row // self.num_speculative_steps
        kind = (temperature[state] > 0).long()
        odds = self._slopes[kind] * self.features[state, slot] + self._intercepts[kind, slot]
        chances = torch.sigmoid(self.slope * odds + self.intercepts[slot])
        self.features[state, slot] = odds
        self.predictions[state, slot] = chances
        confidence_probs[row, slot] = chances


def of_head(
    config: SpecFormerConfig, vllms: OnlineAcceptanceEstimator, max_num_reqs: int, has_bar: bool
) -> Any:
    """What tells a head's chances.

    Args:
        vllms: vLLM's own, as it begins.
        has_bar: chances are held against a threshold of the user's, which must mean the same for
            ever. Then they are the calibration's, or the probability itself where there is none.
            Otherwise a head without calibration has vLLM's own.
    """
    greedy, sampled = config.acceptance_calibration, config.acceptance_calibration_sampled
    if not (has_bar or greedy or sampled):
        return vllms
    curves, slots = Calibrations.of(config), vllms.num_speculative_steps
    if not has_bar:
        usual = Calibration(float(vllms.slope), tuple(vllms.intercepts.tolist()))
        curves = Calibrations(
            curves.greedy if greedy else usual, curves.sampled if sampled else usual
        )
    return CalibratedEstimator(max_num_reqs, slots, vllms.device, curves, learns=not has_bar)
