"""Candidates of a beam in Triton. Imports triton: load this module only to launch."""

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
from specformer_kernels.sample_candidates.triton_kernel import (
    NO_KEY,
    combine_sizes,
    join_sums,
    pack_keys,
    packed_index,
    packed_value,
)
from specformer_kernels.tree_candidates.reference import Candidates, check_arguments

# The second kernel holds the drawn tokens of all chunks of a row at once.
MAX_SCORED = 2**19

_TARGET = tl.constexpr(int(Stream.TARGET))


# Rows of larger tensors, wherever the number of requests puts them.
@triton.jit(do_not_specialize_on_alignment=["sum_ptr", "positions_ptr"])
def _score_chunks_kernel(
    keys_ptr,  # [R, w, num_chunks, NUM_CANDIDATES] int64
    max_ptr,  # [R, w, num_chunks] float32
    sum_ptr,  # [R, w, num_chunks] float32
    logits_ptr,  # [R, N]
    bias_ptr,  # [R, w, N]
    temperature_ptr,  # [R] float32
    seeds_ptr,  # [R] int64
    positions_ptr,  # [R] int64
    token_ids_ptr,  # [N] int64
    ranking,
    drawn_ranking,
    num_scored,
    beam,
    logits_stride_r,
    bias_stride_r,
    bias_stride_w,
    NUM_CANDIDATES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_TOKEN_IDS: tl.constexpr,
    BLOCK_W: tl.constexpr,  # >= w
    BLOCK_V: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b_row = tl.arange(0, BLOCK_W)
    is_row = b_row < beam
    b_place = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    is_scored = b_place < num_scored
    b_logit = tl.load(
        logits_ptr + request * logits_stride_r + b_place, mask=is_scored, other=float("-inf")
    ).to(tl.float32)
    b_score = b_logit[None, :]  # [BLOCK_W, BLOCK_V]
    if HAS_BIAS:
        b_at = b_row.to(tl.int64)[:, None] * bias_stride_w + b_place[None, :]
        b_bias = tl.load(
            bias_ptr + request * bias_stride_r + b_at,
            mask=is_row[:, None] & is_scored[None, :],
            other=0.0,
        )
        b_score = b_score + b_bias.to(tl.float32)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + request)
        if temperature > 0.0:
            seed = tl.load(seeds_ptr + request)
            position = tl.load(positions_ptr + request)
            b_token = b_place.to(tl.int64)
            if HAS_TOKEN_IDS:
                b_token = tl.load(token_ids_ptr + b_place, mask=is_scored, other=0)
            # Drawn once for all rows: siblings and cousins at a position share it.
            b_noise = noise.gumbel(seed, position, b_token, _TARGET)
            b_score = b_score + (temperature * b_noise)[None, :]
        ranking = tl.where(temperature > 0.0, drawn_ranking, ranking)
    b_score = b_score / ranking

    # NaN fails the comparison too. A maximum of +inf tells the second kernel to report the row.
    b_reported = tl.max(tl.where(b_score < float("inf"), 0, 1), 1)  # [BLOCK_W]
    is_possible = (b_score > float("-inf")) & (b_score < float("inf"))
    b_score = tl.where(is_possible, b_score, float("-inf"))
    b_max = tl.max(b_score, 1)
    # Without any possible token the maximum is -inf; -inf minus -inf would be NaN.
    b_origin = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_partial = (request * beam + b_row) * tl.num_programs(1) + chunk
    tl.store(max_ptr + b_partial, tl.where(b_reported > 0, float("inf"), b_max), mask=is_row)
    tl.store(sum_ptr + b_partial, tl.sum(tl.exp(b_score - b_origin[:, None]), 1), mask=is_row)

    b_packed = tl.where(is_possible, pack_keys(b_score, b_place[None, :]), NO_KEY)
    for rank in range(NUM_CANDIDATES):
        b_best = tl.max(b_packed, 1)
        tl.store(keys_ptr + b_partial * NUM_CANDIDATES + rank, b_best, mask=is_row)
        b_packed = tl.where(b_packed == b_best[:, None], NO_KEY, b_packed)


@triton.jit(do_not_specialize_on_alignment=["sum_ptr"])
def _join_chunks_kernel(
    tokens_ptr,  # [R * w, NUM_CANDIDATES] int64
    log_probs_ptr,  # [R * w, NUM_CANDIDATES] float32
    keys_ptr,  # [R * w, num_chunks * NUM_CANDIDATES] int64
    max_ptr,  # [R * w, num_chunks] float32
    sum_ptr,  # [R * w, num_chunks] float32
    token_ids_ptr,  # [N] int64
    chains_ptr,  # [R] bool
    num_chunks,
    beam,
    NUM_CANDIDATES: tl.constexpr,
    HAS_TOKEN_IDS: tl.constexpr,
    HAS_CHAINS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= num_chunks
    BLOCK_K: tl.constexpr,  # >= num_chunks * NUM_CANDIDATES
):
    row = tl.program_id(0).to(tl.int64)
    is_sampled, origin, log_sum = join_sums(
        max_ptr + row * num_chunks, sum_ptr + row * num_chunks, num_chunks, BLOCK_C
    )
    wanted = NUM_CANDIDATES
    if HAS_CHAINS:
        wanted = tl.where(tl.load(chains_ptr + row // beam) != 0, 1, NUM_CANDIDATES)
    b_k = tl.arange(0, BLOCK_K)
    num_keys = num_chunks * NUM_CANDIDATES
    b_packed = tl.load(keys_ptr + row * num_keys + b_k, mask=b_k < num_keys, other=NO_KEY)
    for rank in range(NUM_CANDIDATES):
        best = tl.max(b_packed, 0)
        b_packed = tl.where(b_packed == best, NO_KEY, b_packed)
        is_drawn = is_sampled & (best > NO_KEY) & (rank < wanted)
        token = packed_index(best)
        if HAS_TOKEN_IDS:
            token = tl.load(token_ids_ptr + token, mask=is_drawn, other=-1)
        log_prob = (packed_value(best) - origin) - log_sum
        out = row * NUM_CANDIDATES + rank
        tl.store(tokens_ptr + out, tl.where(is_drawn, token, -1))
        tl.store(log_probs_ptr + out, tl.where(is_drawn, log_prob, float("-inf")))


def tile_sizes(beam: int, scored: int) -> dict[str, int]:
    """Tile sizes and warps of a chunk: sixteen scores a thread.

    Chunks are short, as one request's slot is all there is to spread over a GPU.
    """
    block_w = triton.next_power_of_2(beam)
    block_v = min(max(512, 1024 // max(1, block_w // 4)), max(128, triton.next_power_of_2(scored)))
    return {
        "BLOCK_W": block_w,
        "BLOCK_V": block_v,
        "num_warps": max(1, block_w * block_v // 512),
    }


def tree_candidates(
    logits: Tensor,
    bias: Tensor | None,
    num_candidates: int,
    *,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    ranking: float = 1.0,
    drawn_ranking: float | None = None,
    token_ids: Tensor | None = None,
    chains: Tensor | None = None,
) -> Candidates:
    """Launch two kernels, over requests and chunks of N, then over beam rows; no host sync.

    Shapes and dtypes as in `specformer_kernels.tree_candidates.tree_candidates`; N is at most
    MAX_SCORED and float64 is refused.
    """
    check_arguments(
        logits, bias, num_candidates, temperature, seeds, positions, ranking, drawn_ranking,
        token_ids, chains,
    )  # fmt: skip
    requests, scored = logits.shape
    for name, tensor in (("logits", logits), ("bias", bias)):
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(f"{name}: the kernel computes in float32, found torch.float64")
    if scored > MAX_SCORED:
        raise ValueError(f"logits: expected N of at most {MAX_SCORED}, found {scored}")
    beam = 1 if bias is None else bias.shape[1]
    shape, device = (requests, beam, num_candidates), logits.device
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    log_probs = torch.empty(shape, dtype=torch.float32, device=device)
    if requests == 0:
        return Candidates(tokens, log_probs)

    tiles = tile_sizes(beam, scored)
    num_chunks = triton.cdiv(scored, tiles["BLOCK_V"])
    keys = torch.empty(
        (requests, beam, num_chunks, num_candidates), dtype=torch.int64, device=device
    )
    maxima, sums = torch.empty((2, requests, beam, num_chunks), dtype=torch.float32, device=device)
    with torch.cuda.device_of(logits):
        _score_chunks_kernel[(requests, num_chunks)](
            keys,
            maxima,
            sums,
            logits,
            bias,
            temperature,
            seeds,
            positions,
            token_ids,
            float(ranking),
            float(ranking if drawn_ranking is None else drawn_ranking),
            scored,
            beam,
            logits.stride(0),
            0 if bias is None else bias.stride(0),
            0 if bias is None else bias.stride(1),
            NUM_CANDIDATES=num_candidates,
            HAS_BIAS=bias is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_TOKEN_IDS=token_ids is not None,
            **tiles,
        )
        _join_chunks_kernel[(requests * beam,)](
            tokens,
            log_probs,
            keys,
            maxima,
            sums,
            token_ids,
            chains,
            num_chunks,
            beam,
            NUM_CANDIDATES=num_candidates,
            HAS_TOKEN_IDS=token_ids is not None,
            HAS_CHAINS=chains is not None,
            **combine_sizes(num_chunks, num_candidates),
        )
    return Candidates(tokens, log_probs)
