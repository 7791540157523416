"""Counter-based noise for use inside Triton kernels; `reference.py` says what and why."""

# Device functions' arguments are untyped but for constexprs, upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotate(word, BITS: tl.constexpr):
    return (word << BITS) | (word >> (32 - BITS))


@triton.jit
def _mix(state, word):
    word = _rotate(word * 0xCC9E2D51, 15) * 0x1B873593
    return _rotate(state ^ word, 13) * 5 + 0xE6546B64


@triton.jit
def hash32(seed, position, index, STREAM: tl.constexpr):
    """uint32 words; `seed` and `position` int64, scalars or tensors that broadcast with `index`."""
    seed = seed.to(tl.int64)
    position = position.to(tl.int64)
    # The scalar part comes first, so that only the last mixing is done per index.
    state = (seed ^ seed).to(tl.uint32) ^ STREAM
    state = _mix(state, (seed & 0xFFFFFFFF).to(tl.uint32))
    state = _mix(state, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    state = _mix(state, (position & 0xFFFFFFFF).to(tl.uint32))
    state = _mix(state, index.to(tl.uint32)) ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit
def uniform(seed, position, index, STREAM: tl.constexpr):
    """float32 in (0, 1]: (word + 1/2) * 2**-32, rounded once."""
    word = hash32(seed, position, index, STREAM)
    # Both halves convert and scale exactly, so that the sum alone rounds.
    high = (word >> 16).to(tl.int32).to(tl.float32) * (1.0 / 65536.0)
    low = ((word & 0xFFFF).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    return high + low


@triton.jit
def gumbel(seed, position, index, STREAM: tl.constexpr):
    """Standard Gumbel draws in float32, their large tail from u -> 0."""
    u = uniform(seed, position, index, STREAM)
    # log(1 - u) without log1p, which not every backend has: below 1/4 by its power series (cut at
    # 2e-6 of its value), above it directly, where the subtraction costs nothing that matters.
    series = u * 0.0
    for power in tl.static_range(8, 0, -1):
        series = u * series + 1.0 / power
    direct = tl.log(tl.maximum(1.0 - u, 5.9604644775390625e-08))
    tail = tl.where(u < 0.25, -u * series, direct)
    return -tl.log(-tail)
