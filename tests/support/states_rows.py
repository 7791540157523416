"""Rows with hidden states, held against each other."""

from __future__ import annotations

import torch

from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.rows import texts_of
from vllm_specformer.training.texts import Texts


def same_states(one: HookedRows, other: HookedRows, texts: Texts, batch: list[list[int]]) -> None:
    """All states but those of each text's last token, which nobody looks at."""
    for row, first, index in texts_of(batch, texts):
        part = slice(first, first + int(texts.lengths[index]) - 1)
        for a, b in zip(
            [*one.hooked_states, one.last_states],
            [*other.hooked_states, other.last_states],
            strict=True,
        ):
            apart = (a[row, part] - b[row, part]).norm(dim=-1) / b[row, part].norm(dim=-1)
            assert apart.max() < 1e-5
    for name in ("input_ids", "position_ids", "segments", "anchors", "ends"):
        assert torch.equal(getattr(one, name), getattr(other, name))
