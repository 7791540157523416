"""The training objective: cross entropy of every slot, one slot's logits in memory at a time.

Source: Shi et al. (arXiv 2511.20340), "Implementation Improvements": each slot is sent through the
frozen norm and lm_head, its loss is propagated into the detached slot states, and after the last
slot one backward pass runs through the head. Peak memory is one slot's logits, not K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_specformer.head import SpecFormerHead
from vllm_specformer.training.hidden_states import HookedTarget

IGNORED = -100


def slot_labels(input_ids: Tensor, anchors: Tensor, num_slots: int, lengths: Tensor) -> Tensor:
    """Token `t+2+i` for each anchor `t` and slot `i`; `IGNORED` past a sequence's end.

    Args:
        input_ids: int64 [batch, T]; anchors: int64 [batch, A]; lengths: int64 [batch].

    Returns:
        int64 [batch, A, K]
    """
    positions = anchors.unsqueeze(-1) + 2 + torch.arange(num_slots)
    inside = positions < lengths[:, None, None]
    flat = positions.clamp(max=input_ids.shape[1] - 1).flatten(1)
    labels = input_ids.gather(1, flat).view_as(positions)
    return labels.masked_fill(~inside, IGNORED)


def backward_slots(
    head: SpecFormerHead,
    target: HookedTarget,
    slots: Tensor,
    previous: Tensor,
    labels: Tensor,
    weights: Sequence[float],
) -> list[float]:
    """Accumulate the gradients of the weighted mean of the slots' losses.

    Args:
        slots: the head's output [batch, A, K, H], attached to its graph.
        previous: bonus tokens [batch, A], the token before slot 0 (for the Markov term).
        labels: int64 [batch, A, K]; those that the head does not score count as `IGNORED`.
        weights: one weight per slot; they are normalised to sum to 1.

    Returns:
        The unweighted loss of each slot, nats; NaN for a slot without labels in this batch.
    """
    states = slots.detach().requires_grad_()
    losses = []
    for slot in range(states.shape[2]):
        own = head.to_indices(labels[:, :, slot], IGNORED)
        if (own == IGNORED).all():  # every text of the batch ends before this slot
            losses.append(math.nan)
            continue
        logits = head.scored(target.logits(states[:, :, slot]))
        if head.config.markov_rank:
            before = previous if slot == 0 else labels[:, :, slot - 1].clamp(min=0)
            logits = logits + head.markov_logits(before)
        loss = F.cross_entropy(logits.float().flatten(0, -2), own.flatten(), ignore_index=IGNORED)
        losses.append(float(loss.detach()))
        (loss * (weights[slot] / sum(weights))).backward()
    assert states.grad is not None
    slots.backward(states.grad)
    return losses
