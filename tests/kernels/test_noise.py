"""The noise of the kernels is the reference's, and it is what it claims to be."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from specformer_kernels.noise import Stream, gumbel, reference, uniform
from specformer_kernels.noise import triton_functions as noise

SEEDS = [0, 1, -1, 2**31, -(2**63), 2**63 - 1]
# The kernel's series for log1p is cut at 2e-6 of its value, hence as much in its logarithm; the
# rest is the rounding of values up to 22 in float32.
GUMBEL_ERROR = 5e-6
POSITIONS = [0, 1, 131_071, 2**31 + 5]


@triton.jit
def _noise_kernel(out_ptr, seed_ptr, position_ptr, size, STREAM: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    position = tl.load(position_ptr)
    tl.store(out_ptr + index, noise.uniform(seed, position, index, STREAM), mask=index < size)
    tl.store(out_ptr + size + index, noise.gumbel(seed, position, index, STREAM), mask=index < size)


def draw(seed: int, position: int, size: int, stream: Stream, device: str) -> torch.Tensor:
    from triton.runtime.interpreter import InterpretedFunction

    kernel = _noise_kernel if device == "cuda" else InterpretedFunction(_noise_kernel.fn)
    out = torch.empty(2, size, device=device)
    words = (torch.tensor([word], device=device) for word in (seed, position))
    kernel[(triton.cdiv(size, 256),)](out, *words, size, STREAM=int(stream), BLOCK=256)
    return out.cpu()


@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("seed", SEEDS)
def test_kernel_draws_what_the_reference_draws(
    seed: int, stream: Stream, kernel_device: str
) -> None:
    for position in POSITIONS:
        found = draw(seed, position, 1000, stream, kernel_device)
        key = torch.tensor(seed), torch.tensor(position), torch.arange(1000)
        assert torch.equal(found[0], uniform(*key, stream))
        torch.testing.assert_close(found[1], gumbel(*key, stream), rtol=0, atol=GUMBEL_ERROR)


def test_words_of_the_published_algorithm() -> None:
    """MurmurHash3_x86_32 over the same 16 bytes, in plain integers."""

    def murmur(words: list[int], state: int) -> int:
        mask = 2**32 - 1
        for word in words:
            word = word * 0xCC9E2D51 & mask
            word = (word << 15 | word >> 17) & mask
            state ^= word * 0x1B873593 & mask
            state = ((state << 13 | state >> 19) & mask) * 5 + 0xE6546B64 & mask
        state ^= 4 * len(words)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            state = (state ^ state >> shift) * factor & mask
        return state ^ state >> 16

    # Published test vector: four zero bytes, seed 0.
    assert murmur([0], 0) == 0x2362F9DE
    for seed in SEEDS:
        for position in POSITIONS:
            words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, position & 0xFFFFFFFF, 42]
            found = reference.hash32(
                torch.tensor(seed), torch.tensor(position), torch.tensor(42), Stream.ACCEPT
            )
            assert int(found) == murmur(words, Stream.ACCEPT)


@pytest.mark.parametrize("stream", Stream)
def test_moments(stream: Stream) -> None:
    count = 400_000
    key = torch.tensor(2**40 + 3), torch.arange(400)[:, None], torch.arange(count // 400)
    draws = uniform(*key, stream, dtype=torch.float64).flatten()
    # Five standard errors each: a fixed seed makes this no lottery, and a broken stream fails it.
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
    assert abs(draws.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    noise_draws = gumbel(*key, stream, dtype=torch.float64)
    assert abs(noise_draws.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / count)


def test_streams_seeds_and_positions_are_unrelated() -> None:
    tokens = torch.arange(100_000)
    base = uniform(torch.tensor(7), torch.tensor(9), tokens, Stream.TARGET).double()
    others = [
        (7, 9, Stream.DRAFT),
        (7, 9, Stream.ACCEPT),
        (7, 9, Stream.RESIDUAL),
        (8, 9, Stream.TARGET),
        (7, 10, Stream.TARGET),
        (7 + 2**32, 9, Stream.TARGET),
    ]
    for seed, position, stream in others:
        other = uniform(torch.tensor(seed), torch.tensor(position), tokens, stream).double()
        correlation = torch.corrcoef(torch.stack((base, other)))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(len(tokens)), (seed, position, stream)
