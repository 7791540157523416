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
    """Which state rows want the best tokens: on the host, where a step asks without waiting, and
    on the device, where it takes them from. Only new requests change them.
    """

    def __init__(self, num_states: int, device: torch.device) -> None:
        self._wanted = np.zeros(num_states, dtype=bool)
        self._on_device = torch.zeros(num_states, dtype=torch.bool, device=device)

    def add_request(self, state_row: int, params: Any) -> None:
        """A state row's new tenant, with vLLM's sampling parameters."""
        wanted = wants_best(params)
        if wanted != self._wanted[state_row]:
            self._wanted[state_row] = wanted
            self._on_device[state_row].fill_(wanted)

    def of(self, state_rows: np.ndarray, on_device: Tensor) -> Tensor | None:
        """Bool [R] for the requests in these state rows; None where none of them is such.

        Args:
            state_rows: [R].
            on_device: the same, int32 or int64.
        """
        if not self._wanted[state_rows].any():
            return None
        return self._on_device[on_device.long()]


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
