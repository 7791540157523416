"""What one slot is trained for: a mix of losses whose gradient is written by hand.

Autograd would keep and walk ten tensors over the vocabulary; the gradient itself takes three. With
`q` the draft's and `p` the target's distribution over the scored tokens and `y` the token the
answer has there:

- cross entropy `-log q[y]`, gradient `q - onehot(y)`;
- divergence `KL(p || q) = sum p log p - sum p z + log sum exp z`, gradient `q - p`;
- total variation `1 - sum min(p, q)`, the chance that a draft drawn from `q` is rejected (Leviathan
  et al., arXiv 2211.17192, theorem 3.5), gradient `q (s - sum q s)` with `s = -[q < p]`;
- the hybrid of Samarin et al. (arXiv 2602.23881, "LK losses"): `w KL + (1 - w) TV` with
  `w = exp(-3 a)` of the row's own acceptance `a = 1 - TV`, taken as a constant. A row that is far
  off learns by the divergence, whose gradient does not vanish there, a good one by what is
  accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

IGNORED = -100  # the label of a slot that has none
HYBRID_RATE = 3.0  # the paper's best


@dataclass(frozen=True)
class Mix:
    """Shares of the losses; the rest, up to 1, is cross entropy."""

    divergence: float = 0.0
    variation: float = 0.0
    hybrid: float = 0.0

    @property
    def cross_entropy(self) -> float:
        return 1 - self.divergence - self.variation - self.hybrid

    @property
    def needs_target(self) -> bool:
        """Whether the target's own distribution is looked at."""
        return bool(self.divergence or self.variation or self.hybrid)

    @property
    def needs_overlap(self) -> bool:
        return bool(self.variation or self.hybrid)


@dataclass(frozen=True)
class TargetProbs:
    """The target's distributions at some positions, each made once however many slots look at it.

    `probs` float32 [P, N]; `negative_entropy` float32 [P], sum p log p.
    """

    probs: Tensor
    negative_entropy: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> TargetProbs:
        """From the target's logits [P, N]."""
        log_p = logits.float().log_softmax(-1)
        probs = log_p.exp()
        return cls(probs, torch.linalg.vecdot(probs, log_p.clamp_(min=-1e4)))


def slot_loss(
    logits: Tensor,
    labels: Tensor,
    mix: Mix,
    target: TargetProbs | None,
    places: Tensor | None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over rows of the mixed loss, which has a gradient, and every row's cross entropy [M].

    Args:
        logits: the head's, [M, N].
        labels: int64 [M], places among the N, or `IGNORED`: such a row adds nothing.
        target: the target's distributions, where the mix needs them.
        places: int64 [M], each row's place among them.
        weights: float32 [M], of the rows in the sum; None: 1 each.
    """
    probs = entropy = None
    if target is not None and mix.needs_target:
        probs, entropy = target.probs[places], target.negative_entropy[places]
    counted = (labels != IGNORED).float()
    if weights is not None:
        counted = counted * weights
    applied = _SlotLoss.apply(logits, labels, counted, mix, probs, entropy)
    return cast(tuple[Tensor, Tensor], applied)


class _SlotLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        mix: Mix,
        probs: Tensor | None,
        negative_entropy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scores = logits.float()
        own = labels.clamp(min=0).unsqueeze(-1)
        q = scores.softmax(-1)
        top, best = scores.max(-1, keepdim=True)
        log_sum = (top - q.gather(-1, best).log()).squeeze(-1)
        cross_entropy = log_sum - scores.gather(-1, own).squeeze(-1)
        loss = mix.cross_entropy * cross_entropy
        # `q` becomes the gradient.
        if probs is None:
            q *= mix.cross_entropy
        else:
            divergence = negative_entropy - torch.linalg.vecdot(probs, scores) + log_sum
            loss = loss + _add_target(q, probs, divergence, mix)
        q.scatter_add_(-1, own, torch.full_like(top, -mix.cross_entropy))
        q *= weights.unsqueeze(-1)
        ctx.gradient = q.to(logits.dtype)
        cross_entropy = cross_entropy * (labels != IGNORED)
        ctx.mark_non_differentiable(cross_entropy)
        # What an ignored row has may be infinite.
        return (loss * weights).masked_fill(weights == 0, 0).sum(), cross_entropy

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # a second pass would find it scaled
        return gradient.mul_(scale), None, None, None, None, None


def _add_target(q: Tensor, p: Tensor, divergence: Tensor, mix: Mix) -> Tensor:
    """Turn `q` [M, N] into the gradient but for the label's part, in place.

    Returns what the losses by the target's distributions `p` [M, N] add to every row's loss [M],
    its KL `divergence` [M] given.
    """
    if not mix.needs_overlap:
        q *= mix.cross_entropy + mix.divergence
        q.sub_(p, alpha=mix.divergence)
        return mix.divergence * divergence
    lacking = (q < p).float()
    variation = 1 - torch.minimum(p, q).sum(-1)
    far = torch.exp(-HYBRID_RATE * (1 - variation))
    by_divergence = mix.divergence + mix.hybrid * far
    by_variation = mix.variation + mix.hybrid * (1 - far)
    share = torch.linalg.vecdot(q, lacking).unsqueeze(-1)
    others = (mix.cross_entropy + by_divergence).unsqueeze(-1)
    q *= others + by_variation.unsqueeze(-1) * (share - lacking)
    q -= by_divergence.unsqueeze(-1) * p
    return by_divergence * divergence + by_variation * variation
