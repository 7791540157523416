"""The verification rules, one request at a time; README.md has the mathematics.

A rule sees a request and draws every random number from a `Noise`, so that a test can put a script
in its place and enumerate all that may happen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Masses below this are rounding. It also keeps the quotients below far from float32's limits.
NEGLIGIBLE = 2.0**-100


class Noise(Protocol):
    """The random decisions of one request."""

    def accept(self, probability: float, node: int) -> bool:
        """True with the given probability; asked once about a node at most."""

    def sample(self, weights: Tensor, position: int) -> int:
        """A token with probability proportional to its weight [V]; some weight is positive."""

    def sample_target(self, scores: Tensor, position: int) -> int:
        """A token of softmax(scores), from the noise that the engine's own sampler would meet."""


class Path(NamedTuple):
    """What a rule decided."""

    nodes: list[int]  # the root and the accepted nodes; the last one's row gave the token
    token: int


@dataclass
class Request:
    """One request's rows; node 0 is the root."""

    logits: Tensor  # [n, V] in the computing dtype
    tokens: Sequence[int]  # [n] draft token of each node; the root's is ignored
    children: Sequence[Sequence[int]]  # nodes below each node, in the order they are tried
    positions: Sequence[int]  # [n]
    temperature: float = 1.0  # 0 is greedy
    # Logits [V] that a node's children were drawn from, if any; no function: nothing was drawn.
    draft_logits: Callable[[int], Tensor | None] | None = None

    def target(self, node: int) -> Tensor | None:
        """p of a node [V]; None if its logits cannot be sampled."""
        return _distribution(self.logits[node], self.temperature)

    def proposal(self, node: int) -> Tensor | None:
        """q of a node's children [V]; None if there is none that they can have been drawn from."""
        logits = self.draft_logits(node) if self.draft_logits else None
        return None if logits is None else _distribution(logits, self.temperature)

    def finish(self, noise: Noise, nodes: list[int], weights: Tensor, p: Tensor) -> Path:
        """End at the last of `nodes` with a draw from the weights, or from p if none is left."""
        weights = weights if bool((weights > 0).any()) else p
        return Path(nodes, noise.sample(weights, self.positions[nodes[-1]]))


def walk(request: Request, rule: str, noise: Noise) -> Path | None:
    """Apply a rule; None if the logits of a visited node cannot be sampled."""
    if rule == "greedy" or not request.temperature > 0:
        return follow(request.tokens, request.children, lambda node: _argmax(request.logits[node]))
    if rule == "coupled":
        return coupled(request, noise)
    if request.draft_logits is None:
        return one_hot(request, noise)
    if rule == "block":
        return block(request, noise)
    return recursive_rejection(request, noise, replacement=rule == "rejection_with_replacement")


def follow(
    tokens: Sequence[int], children: Sequence[Sequence[int]], sampled: Callable[[int], int]
) -> Path | None:
    """Step to the child that equals the node's sampled token, until none does."""
    nodes = [0]
    while (token := sampled(nodes[-1])) >= 0:
        child = next((c for c in children[nodes[-1]] if tokens[c] == token), None)
        if child is None:
            return Path(nodes, token)
        nodes.append(child)
    return None


def coupled(request: Request, noise: Noise) -> Path | None:
    """Sample each node's token without a look at the drafts; keep the drafts that agree."""

    def sampled(node: int) -> int:
        if not _is_usable(request.logits[node]):
            return -1
        scores = request.logits[node] / request.temperature
        return noise.sample_target(scores, request.positions[node])

    return follow(request.tokens, request.children, sampled)


def one_hot(request: Request, noise: Noise) -> Path | None:
    """Drafts without a distribution: each is accepted with its share of the mass that is left."""
    nodes = [0]
    while (p := request.target(nodes[-1])) is not None:
        weights, left = p.clone(), 1.0
        accepted = None
        for child in request.children[nodes[-1]]:
            token = request.tokens[child]
            if not 0 <= token < len(p):
                continue
            share = float(weights[token])
            if noise.accept(min(1.0, share / left), child):
                accepted = child
                break
            left -= share
            weights[token] = 0.0
            if left < NEGLIGIBLE:
                break
        if accepted is None:
            return request.finish(noise, nodes, weights, p)
        nodes.append(accepted)
    return None


def recursive_rejection(request: Request, noise: Noise, replacement: bool) -> Path | None:
    """Try each node's children in turn against what the earlier ones have left of p."""
    nodes = [0]
    while (p := request.target(nodes[-1])) is not None:
        accepted, weights = _try_children(request, nodes[-1], p, noise, replacement)
        if accepted is None:
            return request.finish(noise, nodes, weights, p)
        nodes.append(accepted)
    return None


def _try_children(
    request: Request, node: int, p: Tensor, noise: Noise, replacement: bool
) -> tuple[int | None, Tensor]:
    """The accepted child, if any, and the weights left when none was."""
    q = request.proposal(node)
    weights = p
    if q is None:
        return None, weights
    unseen = q.clone()  # what the next child is drawn from, but for its norm m
    b, weight_sum, m = 0.0, 1.0, 1.0
    for child in request.children[node]:
        token = request.tokens[child]
        if not 0 <= token < len(q) or unseen[token] < NEGLIGIBLE:
            continue
        ratio = float(weights[token]) * m / (weight_sum * float(q[token]))
        if noise.accept(min(1.0, ratio), child):
            return child, weights
        b += weight_sum / m
        weights = _residual(p, q, b)
        weight_sum = float(weights.sum())
        if not replacement:
            unseen[token] = 0.0
            # 1 - q(token) - ... would have no correct digit where q is all but one-hot.
            m = float(unseen.sum())
        if min(weight_sum, m) < NEGLIGIBLE:
            break
    return None, weights


def block(request: Request, noise: Noise) -> Path | None:
    """Decide on the whole chain at once: keep the longest prefix whose own test passes."""
    length = 0  # drafts before the first that q cannot have proposed
    joint = [1.0]  # P_i = min(1, P_{i-1} * p / q)
    residuals = []  # (p - q / P_i)+ of row i, up to its norm what a rejection after i leaves
    while (p := request.target(length)) is not None:
        token = request.tokens[length + 1] if request.children[length] else -1
        q = request.proposal(length) if 0 <= token < len(p) else None
        if q is None or q[token] < NEGLIGIBLE:
            break
        residuals.append(_residual(p, q, 1.0 / max(joint[-1], NEGLIGIBLE)))
        joint.append(min(1.0, joint[-1] * float(p[token]) / float(q[token])))
        length += 1
    if p is None:
        return None

    residuals.append(p)  # nothing is proposed after the last draft: q = 0
    kept = 0
    for i in range(1, length + 1):
        mass = joint[i] * float(residuals[i].sum())
        both = mass + (1.0 - joint[i])
        if noise.accept(mass / both if both > 0.0 else 1.0, i):
            kept = i
    p = request.target(kept)
    assert p is not None
    return request.finish(noise, list(range(kept + 1)), residuals[kept], p)


def _residual(p: Tensor, q: Tensor, b: float) -> Tensor:
    """(p - b * q)+, the one form of what every rule leaves of p."""
    return (p - b * q).clamp(min=0.0)


def _distribution(logits: Tensor, temperature: float) -> Tensor | None:
    """softmax(logits / temperature); None if the logits cannot be sampled."""
    if not _is_usable(logits):
        return None
    # At a tiny temperature the quotients are too large to keep their difference.
    return torch.softmax((logits - logits.max()) / temperature, dim=-1)


def _argmax(logits: Tensor) -> int:
    """The first largest; -1 if the logits cannot be sampled."""
    return int(logits.argmax()) if _is_usable(logits) else -1


def _is_usable(logits: Tensor) -> bool:
    """Neither NaN nor +inf, and not -inf throughout."""
    return bool(logits.max().isfinite())
