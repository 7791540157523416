"""States of texts laid side by side into the rows of a batch (see `packing.collate`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_specformer.training.packing import Batch
from vllm_specformer.training.texts import Texts


def texts_of(batch: Batch, texts: Texts) -> list[tuple[int, int, int]]:
    """Row, first place in it, and index of every text of a batch."""
    found = []
    for row, indices in enumerate(batch):
        first = 0
        for index in indices:
            found.append((row, first, index))
            first += int(texts.lengths[index])
    return found


def lay_out(states_of: Callable[[int], Tensor], batch: Batch, texts: Texts, width: int) -> Tensor:
    """States of a batch's texts in rows of `width` tokens: [rows, width, ids, H].

    Args:
        states_of: text -> its states [tokens, ids, H], of all its tokens or of the first ones. The
            rest, and the end of a row, is 0: no anchor sees it.
    """
    found: Tensor | None = None
    for row, first, index in texts_of(batch, texts):
        states = states_of(index)
        if found is None:
            found = states.new_zeros(len(batch), width, *states.shape[1:])
        found[row, first : first + len(states)] = states
    assert found is not None
    return found


def parts_of(states: Tensor, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """States [..., ids, H] by id, ids x [..., H], where and how they are worked with."""
    return [part.contiguous() for part in states.to(device, dtype).unbind(-2)]
