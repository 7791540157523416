"""What is left of p and q when a node is tried: the passes over V of several candidates."""

# Arguments of kernels and device functions are untyped but for constexprs, upper case by Triton's
# custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.verify.triton_draw import exponent_scale, weights_of
from specformer_kernels.verify.triton_nodes import NEGLIGIBLE
from specformer_kernels.verify.triton_rows import load_logits, rows_of_request


@triton.jit
def charge(p_left, q_left):
    """What a rejection adds to b; 0 where too little is left for a node to be tried."""
    is_open = tl.minimum(p_left, q_left) >= NEGLIGIBLE
    return tl.where(is_open, p_left / tl.maximum(q_left, NEGLIGIBLE), 0.0)


@triton.jit
def taken_after(
    taken_ptr,  # [N]
    mass_ptr,  # [N, 2, BLOCK_C]
    row,
    num_chunks,
    IS_DISTINCT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """b of the rules once the node of a row is rejected."""
    b_chunk = tl.arange(0, BLOCK_C)
    mask = b_chunk < num_chunks
    mass_ptr += row * 2 * BLOCK_C + b_chunk
    p_left = tl.sum(tl.load(mass_ptr, mask=mask, other=0.0), 0)
    q_left = 1.0
    if IS_DISTINCT:
        q_left = tl.sum(tl.load(mass_ptr + BLOCK_C, mask=mask, other=0.0), 0)
    return tl.load(taken_ptr + row) + charge(p_left, q_left)


@triton.jit(do_not_specialize=["max_rows", "current_round"])
def _mass_kernel(
    mass_ptr,  # [N, 2, BLOCK_C] sums of (p - b q)+, and of q over tokens not tried before
    taken_ptr,  # [N] b
    sums_ptr,  # [N, 4] max and sum of p, max and sum of q
    round_ptr,  # [N] int32
    previous_ptr,  # [N] int32
    logits_ptr,  # [N, V]
    draft_logits_ptr,  # [M, V]
    tokens_ptr,  # [N]
    row_start_loc_ptr,  # [R + 1]
    parents_ptr,  # [N], or None for chains
    temperature_ptr,  # [R]
    draft_rows_ptr,  # [N]
    logits_stride,
    draft_logits_stride,
    num_chunks,
    vocab_size,
    max_rows,
    current_round,  # from 1
    IS_BLOCK: tl.constexpr,
    IS_DISTINCT: tl.constexpr,
    BLOCK_C: tl.constexpr,  # chunks, padded to a power of two
    BLOCK_V: tl.constexpr,  # tokens per chunk
):
    node = tl.program_id(0)
    chunk = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    start, num_rows = rows_of_request(row_start_loc_ptr, request, max_rows)
    if node >= num_rows:
        return
    row = start + node
    if tl.load(round_ptr + row) != current_round:
        return

    parent = row - 1
    if parents_ptr is not None:
        parent = start + tl.load(parents_ptr + row)
    previous = tl.load(previous_ptr + row)
    taken = 1.0
    if IS_BLOCK:
        taken = tl.load(taken_ptr + row)
    else:
        if current_round > 1:
            taken = taken_after(
                taken_ptr, mass_ptr, start + previous, num_chunks, IS_DISTINCT, BLOCK_C
            )
        if chunk == 0:
            tl.store(taken_ptr + row, taken)

    scale = exponent_scale(tl.load(temperature_ptr + request))
    b_token = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    b_logit = load_logits(logits_ptr, parent, logits_stride, b_token, vocab_size)
    source = tl.load(draft_rows_ptr + parent).to(tl.int64)
    b_draft = load_logits(draft_logits_ptr, source, draft_logits_stride, b_token, vocab_size)
    sums_ptr += parent * 4
    p_sum = tl.load(sums_ptr + 1)
    q_sum = tl.load(sums_ptr + 3)
    b_p = weights_of(b_logit, tl.load(sums_ptr), scale)
    b_q = weights_of(b_draft, tl.load(sums_ptr + 2), scale)
    mass_ptr += row * 2 * BLOCK_C + chunk
    p_left = tl.sum(tl.maximum(b_p - b_q * (taken * p_sum / q_sum), 0.0), 0) / p_sum
    tl.store(mass_ptr, p_left)
    if IS_DISTINCT:
        while previous > 0:
            b_q = tl.where(b_token == tl.load(tokens_ptr + start + previous), 0.0, b_q)
            previous = tl.load(previous_ptr + start + previous)
        tl.store(mass_ptr + BLOCK_C, tl.sum(b_q, 0) / q_sum)
