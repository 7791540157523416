"""Drafting candidate tokens in Triton. Imports triton: load this module only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.noise import Stream
from specformer_kernels.noise import triton_functions as noise
from specformer_kernels.sample_candidates.reference import Candidates, check_arguments

# The second kernel holds the drawn tokens of all chunks of a row at once.
MAX_VOCABULARY = 2**22

# Below every packed key of a finite value.
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def pack_keys(value, index):
    """int64 words that order like float32 `value`, equal values by falling `index`.

    So that one maximum finds the largest value, the lowest index among equals, and which it was.
    Not for NaN.
    """
    # Both zeros are one value, but two bit patterns.
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    # The bits of negative values order backwards.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def packed_index(key):
    """The index inside a packed key."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def packed_value(key):
    """The float32 value inside a packed key."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def join_sums(max_ptr, sum_ptr, num_chunks, BLOCK_C: tl.constexpr):
    """From the chunks' maxima and sums of exponentials, [num_chunks] each, those of their row.

    Returns whether the row is sampled (some token is possible, nothing is to be reported), its
    maximum and the logarithm of its sum of exponentials below that maximum; 0 both if not.
    """
    b_chunk = tl.arange(0, BLOCK_C)
    is_chunk = b_chunk < num_chunks
    b_max = tl.load(max_ptr + b_chunk, mask=is_chunk, other=float("-inf"))
    b_sum = tl.load(sum_ptr + b_chunk, mask=is_chunk, other=0.0)
    row_max = tl.max(b_max, 0)
    is_sampled = (row_max > float("-inf")) & (row_max < float("inf"))
    origin = tl.where(is_sampled, row_max, 0.0)
    b_weight = tl.where(b_max < float("inf"), tl.exp(b_max - origin), 0.0)
    # At least 1 in a row that is sampled, so that its logarithm is never -inf.
    return is_sampled, origin, tl.log(tl.where(is_sampled, tl.sum(b_sum * b_weight, 0), 1.0))


@triton.jit
def _draw_chunks_kernel(
    keys_ptr,  # [N, num_chunks, NUM_CANDIDATES] int64
    max_ptr,  # [N, num_chunks] float32
    sum_ptr,  # [N, num_chunks] float32
    logits_ptr,  # [N, V]
    temperature_ptr,  # [N] float32
    seeds_ptr,  # [N] int64
    positions_ptr,  # [N] int64
    vocabulary,
    logits_stride_n,
    NUM_CANDIDATES: tl.constexpr,
    STREAM: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b_token = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    b_scaled = tl.load(
        logits_ptr + row * logits_stride_n + b_token,
        mask=b_token < vocabulary,
        other=float("-inf"),
    ).to(tl.float32)  # [BLOCK_V]
    b_key = b_scaled
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0.0:
            b_scaled = b_scaled / temperature
            seed = tl.load(seeds_ptr + row)
            position = tl.load(positions_ptr + row)
            b_key = b_scaled + noise.gumbel(seed, position, b_token, STREAM)

    # NaN fails the comparison too. A maximum of +inf tells the second kernel to report the row.
    is_reported = tl.max(tl.where(b_scaled < float("inf"), 0, 1), 0) > 0
    is_possible = (b_scaled > float("-inf")) & (b_scaled < float("inf"))
    b_scaled = tl.where(is_possible, b_scaled, float("-inf"))
    chunk_max = tl.max(b_scaled, 0)
    # Without any possible token the maximum is -inf; -inf minus -inf would be NaN.
    origin = tl.where(chunk_max == float("-inf"), 0.0, chunk_max)
    partial = row * tl.num_programs(1) + chunk
    tl.store(max_ptr + partial, tl.where(is_reported, float("inf"), chunk_max))
    tl.store(sum_ptr + partial, tl.sum(tl.exp(b_scaled - origin), 0))

    b_packed = tl.where(is_possible, pack_keys(b_key, b_token), NO_KEY)
    for rank in range(NUM_CANDIDATES):
        best = tl.max(b_packed, 0)
        tl.store(keys_ptr + partial * NUM_CANDIDATES + rank, best)
        b_packed = tl.where(b_packed == best, NO_KEY, b_packed)


@triton.jit
def _combine_chunks_kernel(
    tokens_ptr,  # [N, NUM_CANDIDATES] int64
    log_probs_ptr,  # [N, NUM_CANDIDATES] float32
    keys_ptr,  # [N, num_chunks * NUM_CANDIDATES] int64
    max_ptr,  # [N, num_chunks] float32
    sum_ptr,  # [N, num_chunks] float32
    logits_ptr,  # [N, V]
    temperature_ptr,  # [N] float32
    num_chunks,
    logits_stride_n,
    NUM_CANDIDATES: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= num_chunks
    BLOCK_K: tl.constexpr,  # >= num_chunks * NUM_CANDIDATES
):
    row = tl.program_id(0).to(tl.int64)
    is_sampled, origin, log_sum = join_sums(
        max_ptr + row * num_chunks, sum_ptr + row * num_chunks, num_chunks, BLOCK_C
    )
    divisor = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
        divisor = tl.where(temperature > 0.0, temperature, 1.0)

    b_k = tl.arange(0, BLOCK_K)
    num_keys = num_chunks * NUM_CANDIDATES
    b_packed = tl.load(keys_ptr + row * num_keys + b_k, mask=b_k < num_keys, other=NO_KEY)
    for rank in range(NUM_CANDIDATES):
        best = tl.max(b_packed, 0)
        b_packed = tl.where(b_packed == best, NO_KEY, b_packed)
        is_drawn = is_sampled & (best > NO_KEY)
        token = packed_index(best)
        logit = tl.load(logits_ptr + row * logits_stride_n + token, mask=is_drawn, other=0.0)
        log_prob = (logit.to(tl.float32) / divisor - origin) - log_sum
        out = row * NUM_CANDIDATES + rank
        tl.store(tokens_ptr + out, tl.where(is_drawn, token, -1))
        tl.store(log_probs_ptr + out, tl.where(is_drawn, log_prob, float("-inf")))


def tile_sizes(vocabulary: int) -> dict[str, int]:
    """Tile size and warps of a chunk: sixteen tokens a thread."""
    block_v = min(4096, max(128, triton.next_power_of_2(vocabulary)))
    return {"BLOCK_V": block_v, "num_warps": max(1, block_v // 512)}


def combine_sizes(num_chunks: int, num_candidates: int) -> dict[str, int]:
    """Tile sizes and warps of the second kernel, which holds all of a row's keys."""
    block_k = triton.next_power_of_2(num_chunks * num_candidates)
    return {
        "BLOCK_C": triton.next_power_of_2(num_chunks),
        "BLOCK_K": block_k,
        "num_warps": min(16, max(1, block_k // 256)),
    }


def sample_candidates(
    logits: Tensor,
    num_candidates: int,
    *,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    coupled: bool = False,
) -> Candidates:
    """Launch two kernels, over rows and chunks of the vocabulary, then over rows; no host sync.

    Shapes and dtypes as in `specformer_kernels.sample_candidates.sample_candidates`; V is at most
    MAX_VOCABULARY and float64 is refused.
    """
    check_arguments(logits, num_candidates, temperature, seeds, positions)
    num_rows, vocabulary = logits.shape
    if logits.dtype == torch.float64:
        raise ValueError("logits: the kernel computes in float32, found torch.float64")
    if vocabulary > MAX_VOCABULARY:
        raise ValueError(f"logits: expected V of at most {MAX_VOCABULARY}, found {vocabulary}")
    device = logits.device
    tokens = torch.empty((num_rows, num_candidates), dtype=torch.int64, device=device)
    log_probs = torch.empty((num_rows, num_candidates), dtype=torch.float32, device=device)
    if num_rows == 0:
        return Candidates(tokens, log_probs)

    tiles = tile_sizes(vocabulary)
    num_chunks = triton.cdiv(vocabulary, tiles["BLOCK_V"])
    keys = torch.empty((num_rows, num_chunks, num_candidates), dtype=torch.int64, device=device)
    maxima, sums = torch.empty((2, num_rows, num_chunks), dtype=torch.float32, device=device)
    with torch.cuda.device_of(logits):
        _draw_chunks_kernel[(num_rows, num_chunks)](
            keys,
            maxima,
            sums,
            logits,
            temperature,
            seeds,
            positions,
            vocabulary,
            logits.stride(0),
            NUM_CANDIDATES=num_candidates,
            STREAM=int(Stream.TARGET if coupled else Stream.DRAFT),
            HAS_TEMPERATURE=temperature is not None,
            **tiles,
        )
        _combine_chunks_kernel[(num_rows,)](
            tokens,
            log_probs,
            keys,
            maxima,
            sums,
            logits,
            temperature,
            num_chunks,
            logits.stride(0),
            NUM_CANDIDATES=num_candidates,
            HAS_TEMPERATURE=temperature is not None,
            **combine_sizes(num_chunks, num_candidates),
        )
    return Candidates(tokens, log_probs)
