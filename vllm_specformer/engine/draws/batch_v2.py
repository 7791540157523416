"""Requests on the V2 runner that get the head's best tokens while others draw.

vLLM verifies a drawn draft by the logits it was drawn from, which it caches as it draws. A row that
keeps its best logit alone draws that token, and is verified as certain of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_specformer.engine.draws.rules import wants_best


class BestRows:
    """Which state rows want the best tokens; on the host, where a step asks without waiting."""

    def __init__(self, num_states: int) -> None:
        self._wanted = np.zeros(num_states, dtype=bool)

    def add_request(self, state_row: int, params: Any) -> None:
        """A state row's new tenant, with vLLM's sampling parameters."""
        self._wanted[state_row] = wants_best(params)

    def of(self, state_rows: np.ndarray, device: torch.device) -> Tensor | None:
        """Bool [R] for the requests in these state rows; None where none of them is such."""
        wanted = self._wanted[state_rows]
        if not wanted.any():
            return None
        return torch.from_numpy(wanted).to(device, non_blocking=True)


def keep_best(logits: Tensor, wanted: Tensor) -> Tensor:
    """Logits in which the rows of some requests have their first best token alone, else -inf.

    Args:
        logits: [R * n, V], the n rows of a request after one another.
        wanted: bool [R].
    """
    rows = wanted.repeat_interleave(len(logits) // len(wanted))
    tokens = torch.arange(logits.shape[1], device=logits.device)
    is_other = tokens != logits.argmax(-1, keepdim=True)
    return logits.masked_fill(rows[:, None] & is_other, float("-inf"))
