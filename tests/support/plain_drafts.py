"""Drafts of a head over one text, without packing, parts or batches."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget


@torch.no_grad()
def head_drafts(
    head: SpecFormerHead, target: HookedTarget, text: Tensor, num_tokens: int
) -> Tensor:
    """Greedy drafts at every position of a text, as the engine makes them when asked for n tokens.

    int64 [T] -> int64 [T - 1, n]
    """
    states, _ = target(text[None])
    anchors = torch.arange(len(text) - 1)[None]
    bonus = text[None, 1:]
    slots = head(states, anchors, target.embed(bonus), head.slots_to_run(num_tokens))
    normed = target.norm(slots[:, :, :num_tokens])
    return head.draft(target.lm_head(normed), bonus, head.markov_gates(normed))[0]
