"""Drawing a token of a chunk of the vocabulary."""

# Arguments of kernels and device functions are untyped but for constexprs, upper case by Triton's
# custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.noise import triton_functions as noise

NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def exponent_scale(temperature):
    """Factor on logits that makes exp2(factor * logit) = exp(logit / temperature)."""
    # Finite, because a factor of infinity times a difference of 0 would be NaN.
    return tl.minimum(1.4426950408889634 / temperature, 3.0e38)


@triton.jit
def first_max(b_value, b_token):
    """The largest value and the first token that has it."""
    value = tl.max(b_value, 0)
    return value, tl.min(tl.where(b_value == value, b_token, NO_TOKEN), 0)


@triton.jit
def weights_of(b_logit, largest, scale):
    """exp((logit - largest) / temperature); 0 where nothing is finite, NaN after NaN or +inf."""
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.exp2((b_logit - base) * scale)


@triton.jit
def contenders(b_weight, b_token, seed, position, slack, STREAM: tl.constexpr):
    """Tokens that may have the largest log(weight) + Gumbel, and their number: mostly one.

    Gumbel noise is -log(t) with t = -log(1 - u), two costly logarithms. But weight / t orders the
    tokens alike, and u <= t <= u / (1 - u) puts it between weight / u - weight and weight / u.
    `slack` is what rounding may do to the difference of two scores.
    """
    b_most = b_weight / noise.uniform(seed, position, b_token, STREAM)
    b_is_contender = b_most >= tl.max(b_most - b_weight, 0) * tl.exp(-slack)
    return b_is_contender, tl.sum(b_is_contender.to(tl.int32), 0)


@triton.jit
def draw_by_logit(b_logit, temperature, b_token, seed, position, STREAM: tl.constexpr):
    """Largest logit / temperature + Gumbel and the first token that has it.

    The logits are divided first and the noise is added in float32, as vLLM's sampler does. Without
    a finite maximum of the logits it takes the score's place.
    """
    score = tl.max(b_logit, 0)
    winner = NO_TOKEN
    if (score > float("-inf")) & (score < float("inf")):
        b_weight = weights_of(b_logit, score, exponent_scale(temperature))
        # The larger the scores, the more digits of the noise are lost.
        slack = 1e-4 + tl.abs(score / temperature) * 5e-7
        b_is_contender, count = contenders(b_weight, b_token, seed, position, slack, STREAM)
        if count == 1:
            winner = tl.min(tl.where(b_is_contender, b_token, NO_TOKEN), 0)
            logit = tl.max(tl.where(b_is_contender, b_logit, float("-inf")), 0)
            score = logit / temperature + noise.gumbel(seed, position, winner, STREAM)
        else:
            b_score = b_logit / temperature + noise.gumbel(seed, position, b_token, STREAM)
            score, winner = first_max(b_score, b_token)
    return score, winner


@triton.jit
def draw_by_weight(b_weight, b_token, seed, position, STREAM: tl.constexpr):
    """Largest log(weight) + Gumbel, -inf if no weight is positive, and the first token with it."""
    score = float("-inf")
    winner = NO_TOKEN
    if tl.max(b_weight, 0) > 0.0:
        # These scores stay below 128, where float32 resolves 1e-5.
        b_is_contender, count = contenders(b_weight, b_token, seed, position, 1e-4, STREAM)
        if count == 1:
            winner = tl.min(tl.where(b_is_contender, b_token, NO_TOKEN), 0)
            weight = tl.max(tl.where(b_is_contender, b_weight, 0.0), 0)
            score = tl.log(weight) + noise.gumbel(seed, position, winner, STREAM)
        else:
            b_score = tl.log(b_weight) + noise.gumbel(seed, position, b_token, STREAM)
            score, winner = first_max(b_score, b_token)
    return score, winner
