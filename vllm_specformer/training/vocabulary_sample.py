"""The tokens that one training step scores, where it does not score them all.

Most of a step's arithmetic over a large vocabulary concerns tokens that the target would never say
there. So the tokens that matter to it in the batch are scored one by one, and of the others every
n-th, which then stands for n of them: the sampled softmax of Jean et al. (arXiv 1412.2007), section
3, with the proposals drawn evenly, so that every correction is log n. Cross entropy, divergence and
total variation are those of the coarser distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_specformer.target.ends import TargetEnds
from vllm_specformer.training.slot_loss import IGNORED

_CERTAIN = 0.5  # share of the tokens that are scored because they matter
_LEAST = 0.25  # least share of those that stand for others
_LABEL = 2.0  # above every probability


@dataclass(frozen=True)
class VocabularySample:
    """S of the N tokens that a head scores.

    `indices` int64 [S], places among the N in increasing order; `offsets` float32 [S], the log of
    the number of tokens that each stands for; `lm_head` takes normed states [..., H] to logits
    [..., S], without the offsets.
    """

    indices: Tensor
    offsets: Tensor
    lm_head: Callable[[Tensor], Tensor]

    def places(self, labels: Tensor) -> Tensor:
        """Labels among the N, or `IGNORED`, as places among the S, which hold all of them."""
        places = torch.searchsorted(self.indices, labels.clamp(min=0).contiguous())
        return torch.where(labels == IGNORED, IGNORED, places)


@torch.no_grad()
def draw_sample(
    target: TargetEnds, total: int, states: Tensor, labels: Tensor, size: int, memory: int
) -> VocabularySample:
    """The tokens to score in a step.

    All labels are among them, then those to which the target gives most at any position. There is
    no other randomness than in these, so a repeated step draws the same.

    Args:
        target: what it scores are the N tokens.
        total: N.
        states: its states behind the final norm, of the positions that are predicted, [P, H].
        labels: int64 [...], places among the N, or `IGNORED`.
        size: S, about: more if there are more different labels.
        memory: bytes that logits may take, about.
    """
    known = labels[labels != IGNORED]
    likely = _likeliest(target, states, total, memory)
    likely[known] = _LABEL
    certain = min(total, max(round(size * _CERTAIN), int((likely == _LABEL).sum())))
    chosen = torch.zeros(total, dtype=torch.bool, device=likely.device)
    chosen[likely.topk(certain).indices] = True
    rest = (~chosen).nonzero().squeeze(-1)
    # Many labels must not leave a single token to stand for all others.
    spare = max(size - certain, math.ceil(size * _LEAST))
    stride = max(1, math.ceil(len(rest) / spare))
    first = int(known.sum()) % stride
    drawn = rest[first::stride]
    offsets = torch.zeros(total, device=likely.device)
    if len(drawn):
        offsets[drawn] = math.log(len(rest) / len(drawn))
        chosen[drawn] = True
    indices = chosen.nonzero().squeeze(-1)
    return VocabularySample(indices, offsets[indices], target.lm_head_of(indices))


def _likeliest(target: TargetEnds, states: Tensor, total: int, memory: int) -> Tensor:
    """The largest probability that each token has at any position, float32 [N]."""
    rows = max(1, memory // (3 * 4 * total))
    found = torch.zeros(total, device=states.device)
    for part in states.split(rows):
        probs = target.lm_head(part).float().softmax(-1)
        torch.maximum(found, probs.amax(0), out=found)
    return found
