"""Joining the partial results of split contexts in Triton. Imports triton."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.block_attention.triton_splits import find_split, load_lens, longest_split


@triton.jit(do_not_specialize=["num_requests", "target_splits"])
def _combine_kernel(
    out_ptr,  # [T, num_heads, head_size]
    partial_out_ptr,  # [partials, num_kv_heads, max_rows, head_size] float32
    partial_max_ptr,  # [partials, num_kv_heads, max_rows] float32
    partial_sum_ptr,  # [partials, num_kv_heads, max_rows] float32
    context_lens_ptr,  # [R]
    block_start_loc_ptr,  # [R + 1]
    num_requests,
    target_splits,
    max_rows,  # rows of the longest block x query heads of one KV head
    out_stride_t,
    out_stride_h,
    MIN_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,  # partial results per step
    BLOCK_D: tl.constexpr,  # head size, padded to a power of two
    VISIBLE: tl.constexpr,  # most context tokens that a request's rows see; 0: all
):
    # One program per partial result and not per request: a grid the host can know, and the longer
    # a request's list of partial results is, the more programs share its rows.
    split_tokens = longest_split(
        context_lens_ptr, num_requests, target_splits, MIN_TOKENS, BLOCK_N, BLOCK_R, VISIBLE
    )
    index = tl.program_id(0)
    request, part, _ = find_split(
        index, split_tokens, context_lens_ptr, num_requests, True, BLOCK_R, VISIBLE
    )
    if request >= num_requests:
        return

    first_row = tl.load(block_start_loc_ptr + request).to(tl.int64)
    num_rows = (tl.load(block_start_loc_ptr + request + 1) - first_row).to(tl.int32)
    context_len = load_lens(context_lens_ptr, request, num_requests, VISIBLE)
    num_parts = tl.cdiv(context_len, split_tokens)
    kv_head = tl.program_id(1).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    first_partial = (index - part).to(tl.int64)
    num_shares = tl.num_programs(2)

    b_s = tl.arange(0, BLOCK_S)
    b_d = tl.arange(0, BLOCK_D)
    is_dim = b_d < HEAD_SIZE
    for m in range(part * num_shares + tl.program_id(2), num_rows * GROUP, num_parts * num_shares):
        highest = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        b_out = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for first in range(0, num_parts, BLOCK_S):
            is_part = first + b_s < num_parts
            b_partial = ((first_partial + first + b_s) * num_kv_heads + kv_head) * max_rows + m
            b_max = tl.load(partial_max_ptr + b_partial, mask=is_part, other=float("-inf"))
            b_sum = tl.load(partial_sum_ptr + b_partial, mask=is_part, other=0.0)
            b_part_out = tl.load(
                partial_out_ptr + (b_partial * HEAD_SIZE)[:, None] + b_d[None, :],
                mask=is_part[:, None] & is_dim[None, :],
                other=0.0,
            )  # [BLOCK_S, BLOCK_D]
            # Finite: every part of a split context holds tokens, and every row sees them.
            new_highest = tl.maximum(highest, tl.max(b_max, 0))
            rescale = tl.exp2(highest - new_highest)
            b_weight = tl.exp2(b_max - new_highest)
            total = total * rescale + tl.sum(b_weight * b_sum, 0)
            b_out = b_out * rescale + tl.sum(b_weight[:, None] * b_part_out, 0)
            highest = new_highest
        row = first_row + m // GROUP
        head = kv_head * GROUP + m % GROUP
        out_ptrs = out_ptr + row * out_stride_t + head * out_stride_h + b_d
        tl.store(out_ptrs, (b_out / total).to(out_ptr.dtype.element_ty), mask=is_dim)
