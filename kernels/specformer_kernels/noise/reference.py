"""Counter-based noise in PyTorch, bit for bit what the Triton kernels draw.

The generator is MurmurHash3's 32-bit mixing (Austin Appleby, public domain) over the words of
(seed, position, index). vLLM's V2 sampler draws its Gumbel noise from the same construction
(`vllm/v1/worker/gpu/sample/gumbel.py`, 0.32), so `Stream.TARGET` reproduces its samples.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """Purposes whose draws must not depend on each other, at the same seed and position."""

    TARGET = 0  # the token sampled from the target: vLLM's own stream
    DRAFT = 0x6D2B79F5  # candidates drawn independently of the target's noise
    ACCEPT = 0x1B56C4E9  # acceptance tests, indexed by sibling
    RESIDUAL = 0x2545F491  # the token sampled once a draft is rejected, or after all are accepted


def hash32(seed: Tensor, position: Tensor, index: Tensor, stream: int) -> Tensor:
    """32 bits in int64 tensors, broadcast over the integer arguments."""
    seed, position, index = (word.to(torch.int64) for word in (seed, position, index))
    state = torch.full_like(seed, int(stream))
    for word in (seed & _WORD, (seed >> 32) & _WORD, position & _WORD, index & _WORD):
        state = _mix(state, word)
    return _finalise(state ^ 16)  # 16: the bytes that were hashed


def uniform(
    seed: Tensor,
    position: Tensor,
    index: Tensor,
    stream: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform draws in (0, 1], broadcast over the integer arguments.

    The value is (word + 1/2) * 2**-32 rounded to float32 (also when `dtype` is float64, so that
    both precisions decide alike); 1.0 itself comes up with probability 2**-25.
    """
    word = hash32(seed, position, index, stream)
    return ((word.double() + 0.5) * 2.0**-32).float().to(dtype)


def gumbel(
    seed: Tensor,
    position: Tensor,
    index: Tensor,
    stream: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard Gumbel draws, broadcast over the integer arguments.

    `-log(-log(1 - u))`: the large values, which decide an argmax, come from u -> 0, where float32
    is fine-grained.
    """
    u = uniform(seed, position, index, stream, dtype)
    # u = 1 would give -inf, which is right (it never wins) but must not meet an infinite logit.
    tail = torch.log1p(-u.clamp(max=1.0 - 2.0**-24))
    return -torch.log(-tail)


def _mix(state: Tensor, word: Tensor) -> Tensor:
    word = (word * 0xCC9E2D51) & _WORD
    word = _rotate(word, 15)
    word = (word * 0x1B873593) & _WORD
    state = _rotate(state ^ word, 13)
    return (state * 5 + 0xE6546B64) & _WORD


def _rotate(word: Tensor, bits: int) -> Tensor:
    return ((word << bits) & _WORD) | (word >> (32 - bits))


def _finalise(state: Tensor) -> Tensor:
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _WORD
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _WORD
    return state ^ (state >> 16)
