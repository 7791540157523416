"""What one slot is trained for: a mix of three losses whose gradient is written by hand.

Autograd would keep and walk ten tensors over the vocabulary; the gradient itself takes three. With
`q` the draft's and `p` the target's distribution over the scored tokens and `y` the token the
answer has there:

- cross entropy `-log q[y]`, gradient `q - onehot(y)`;
- divergence `KL(p || q) = sum p log p - sum p z + log sum exp z`, gradient `q - p`;
- total variation `1 - sum min(p, q)`, the chance that a draft drawn from `q` is rejected (Leviathan
  et al., arXiv 2211.17192, theorem 3.5), gradient `q (s - sum q s)` with `s = -[q < p]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

IGNORED = -100  # the label of a slot that has none


@dataclass(frozen=True)
class Mix:
    """Shares of the losses: `divergence` and `variation`; the rest, up to 1, is cross entropy."""

    divergence: float = 0.0
    variation: float = 0.0

    @property
    def cross_entropy(self) -> float:
        return 1 - self.divergence - self.variation

    @property
    def needs_target(self) -> bool:
        """Whether the target's own distribution is looked at."""
        return bool(self.divergence or self.variation)


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
    logits: Tensor, labels: Tensor, mix: Mix, target: TargetProbs | None, places: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over rows: the mixed loss, which has a gradient, and the cross entropy, which has none.

    Args:
        logits: the head's, [M, N].
        labels: int64 [M], places among the N, or `IGNORED`: such a row adds nothing.
        target: the target's distributions, where the mix needs them.
        places: int64 [M], each row's place among them.
    """
    probs = entropy = None
    if target is not None and mix.needs_target:
        probs, entropy = target.probs[places], target.negative_entropy[places]
    return cast(tuple[Tensor, Tensor], _SlotLoss.apply(logits, labels, mix, probs, entropy))


class _SlotLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        mix: Mix,
        probs: Tensor | None,
        negative_entropy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scores = logits.float()
        counted = labels != IGNORED
        own = labels.clamp(min=0).unsqueeze(-1)
        q = scores.softmax(-1)
        top, best = scores.max(-1, keepdim=True)
        log_sum = (top - q.gather(-1, best).log()).squeeze(-1)
        cross_entropy = (log_sum - scores.gather(-1, own).squeeze(-1)) * counted
        loss = mix.cross_entropy * cross_entropy
        # `q` becomes the gradient.
        if probs is None:
            q *= mix.cross_entropy
        else:
            divergence = negative_entropy - torch.linalg.vecdot(probs, scores) + log_sum
            loss = loss + mix.divergence * divergence * counted
            variation = _add_variation(q, probs, mix)
            loss = loss + mix.variation * variation * counted
            q.sub_(probs, alpha=mix.divergence)
        q.scatter_add_(-1, own, torch.full_like(top, -mix.cross_entropy))
        q *= counted.unsqueeze(-1)
        ctx.gradient = q.to(logits.dtype)
        total = cross_entropy.sum()
        ctx.mark_non_differentiable(total)
        return loss.sum(), total

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # a second pass would find it scaled
        return gradient.mul_(scale), None, None, None, None


def _add_variation(q: Tensor, p: Tensor, mix: Mix) -> Tensor:
    """Turn `q` [M, N] into its part of the gradient, in place; returns the total variations [M]."""
    others = mix.cross_entropy + mix.divergence
    if not mix.variation:
        q *= others
        return q.new_zeros(len(q))
    lacking = (q < p).float()
    variation = 1 - torch.minimum(p, q).sum(-1)
    share = torch.linalg.vecdot(q, lacking).unsqueeze(-1)
    q *= others + mix.variation * (share - lacking)
    return variation
