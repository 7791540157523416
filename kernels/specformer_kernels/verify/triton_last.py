"""The token after the accepted ones, drawn from what the rule has left of one row's p."""

# Arguments of kernels and device functions are untyped but for constexprs, upper case by Triton's
# custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.noise import Stream
from specformer_kernels.verify.triton_draw import (
    NO_TOKEN,
    draw_by_weight,
    exponent_scale,
    first_max,
    weights_of,
)
from specformer_kernels.verify.triton_rows import load_logits

RESIDUAL = tl.constexpr(int(Stream.RESIDUAL))


@triton.jit
def without_children(
    b_weight,
    b_token,
    tokens_ptr,  # [N]
    row_start_loc_ptr,  # [R + 1]
    parents_ptr,  # [N], or None for chains
    request,
    row,
    max_rows,
):
    """Weights with the tokens of a row's children at 0."""
    start = tl.load(row_start_loc_ptr + request).to(tl.int64)
    end = tl.load(row_start_loc_ptr + request + 1).to(tl.int64)
    end = tl.minimum(end, start + max_rows)
    if parents_ptr is None:
        end = tl.minimum(end, row + 2)
    for other in range(row + 1, end):
        parent = row
        if parents_ptr is not None:
            parent = start + tl.load(parents_ptr + other)
        is_child = (parent == row) & (b_token == tl.load(tokens_ptr + other))
        b_weight = tl.where(is_child, 0.0, b_weight)
    return b_weight


@triton.jit(do_not_specialize=["max_rows"])
def _draw_kernel(
    draw_best_ptr,  # [R, BLOCK_C]
    draw_winners_ptr,  # [R, BLOCK_C] int32
    draw_rows_ptr,  # [R]
    draw_weights_ptr,  # [R, 3]
    logits_ptr,  # [N, V]
    draft_logits_ptr,  # [M, V], or None
    tokens_ptr,  # [N]
    row_start_loc_ptr,  # [R + 1]
    parents_ptr,  # [N], or None for chains
    temperature_ptr,  # [R]
    seeds_ptr,  # [R]
    positions_ptr,  # [N]
    draft_rows_ptr,  # [N], or None
    logits_stride,
    draft_logits_stride,
    vocab_size,
    max_rows,
    BLOCK_C: tl.constexpr,  # chunks, padded to a power of two
    BLOCK_V: tl.constexpr,  # tokens per chunk
):
    chunk = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    row = tl.load(draw_rows_ptr + request)
    if row < 0:
        return
    scale = exponent_scale(tl.load(temperature_ptr + request))
    draw_weights_ptr += request * 3
    b_token = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    b_logit = load_logits(logits_ptr, row, logits_stride, b_token, vocab_size)
    b_weight = weights_of(b_logit, tl.load(draw_weights_ptr), scale)
    if draft_logits_ptr is None:
        b_weight = without_children(
            b_weight, b_token, tokens_ptr, row_start_loc_ptr, parents_ptr, request, row, max_rows
        )
    else:
        ratio = tl.load(draw_weights_ptr + 2)
        if ratio > 0.0:
            source = tl.load(draft_rows_ptr + row).to(tl.int64)
            b_draft = load_logits(
                draft_logits_ptr, source, draft_logits_stride, b_token, vocab_size
            )
            b_draft = weights_of(b_draft, tl.load(draw_weights_ptr + 1), scale)
            b_weight = tl.maximum(b_weight - ratio * b_draft, 0.0)
    seed = tl.load(seeds_ptr + request)
    position = tl.load(positions_ptr + row)
    best, winner = draw_by_weight(b_weight, b_token, seed, position, RESIDUAL)
    tl.store(draw_best_ptr + request * BLOCK_C + chunk, best)
    tl.store(draw_winners_ptr + request * BLOCK_C + chunk, winner)


@triton.jit(do_not_specialize=["max_rows"])
def _last_kernel(
    out_tokens_ptr,  # [R, max_rows]
    num_tokens_ptr,  # [R]
    draw_best_ptr,  # [R, BLOCK_C]
    draw_winners_ptr,  # [R, BLOCK_C]
    draw_rows_ptr,  # [R]
    draw_weights_ptr,  # [R, 3]
    logits_ptr,  # [N, V]
    temperature_ptr,  # [R]
    seeds_ptr,  # [R]
    positions_ptr,  # [N]
    logits_stride,
    num_chunks,
    vocab_size,
    max_rows,
    BLOCK_C: tl.constexpr,  # chunks, padded to a power of two
    BLOCK_V: tl.constexpr,  # tokens per chunk
):
    request = tl.program_id(0).to(tl.int64)
    row = tl.load(draw_rows_ptr + request)
    if row < 0:
        return
    b_chunk = tl.arange(0, BLOCK_C)
    mask = b_chunk < num_chunks
    offsets = request * BLOCK_C + b_chunk
    b_best = tl.load(draw_best_ptr + offsets, mask=mask, other=float("-inf"))
    best, token = first_max(b_best, tl.load(draw_winners_ptr + offsets, mask=mask, other=NO_TOKEN))
    if best == float("-inf"):
        # Only rounding leaves no weight at all; p itself is then as good, and rare enough for one
        # program to go through the row.
        scale = exponent_scale(tl.load(temperature_ptr + request))
        largest = tl.load(draw_weights_ptr + request * 3)
        seed = tl.load(seeds_ptr + request)
        position = tl.load(positions_ptr + row)
        for chunk in range(num_chunks):
            b_token = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
            b_logit = load_logits(logits_ptr, row, logits_stride, b_token, vocab_size)
            b_weight = weights_of(b_logit, largest, scale)
            score, winner = draw_by_weight(b_weight, b_token, seed, position, RESIDUAL)
            token = tl.where(score > best, winner, token)
            best = tl.maximum(score, best)
    num_tokens = tl.load(num_tokens_ptr + request)
    tl.store(out_tokens_ptr + request * max_rows + num_tokens - 1, token)
