"""The texts of a batch as the head is trained on them, with what the target made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_specformer.training.slot_loss import IGNORED


@dataclass(frozen=True)
class HookedRows:
    """Packed rows and what the target made of them.

    `hooked_states` G x [rows, T, H] and `last_states` [rows, T, H], after the final norm;
    `input_ids`, `position_ids`, `segments` int64 [rows, T]; `anchors`, `ends` int64 [rows, A] (see
    `packing.collate`).
    """

    hooked_states: list[Tensor]
    last_states: Tensor
    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    anchors: Tensor
    ends: Tensor

    def at(self, values: Tensor, positions: Tensor) -> Tensor:
        """Values [rows, T, ...] at int64 positions [rows, A]: [rows, A, ...]."""
        rows = torch.arange(len(values), device=values.device).unsqueeze(-1)
        return values[rows, positions]

    @property
    def bonus_tokens(self) -> Tensor:
        """The token after each anchor, int64 [rows, A]."""
        return self.at(self.input_ids, self.after_anchors(1))

    def after_anchors(self, distance: int) -> Tensor:
        """Positions so far behind the anchors, kept within the row."""
        return (self.anchors + distance).clamp(max=self.input_ids.shape[1] - 1)

    def labels(self, num_slots: int) -> Tensor:
        """Token `t+2+i` of the same answer, else `IGNORED`: int64 [rows, A, num_slots]."""
        slots = torch.arange(num_slots, device=self.anchors.device)
        positions = self.anchors.unsqueeze(-1) + 2 + slots
        tokens = self.input_ids.gather(
            1, positions.clamp(max=self.input_ids.shape[1] - 1).flatten(1)
        )
        return tokens.view_as(positions).masked_fill(positions >= self.ends.unsqueeze(-1), IGNORED)
