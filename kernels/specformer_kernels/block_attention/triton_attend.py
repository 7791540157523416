"""Attention of a block over context and block in Triton. Imports triton."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.block_attention.triton_splits import find_split, load_lens, longest_split


@triton.jit
def attend(b_query, b_key, b_value, b_visible, scale_log2, b_max, b_sum, b_out):
    """One step of the online softmax, over the columns that `b_visible` [BLOCK_M, BLOCK_N] allows.

    b_out [BLOCK_M, BLOCK_D] sums the values weighted by 2 ** (score - b_max), b_sum the weights.
    """
    # "ieee": tf32 would cost float32 serving its exactness against the reference.
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale_log2
    b_scores = tl.where(b_visible, b_scores, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
    # A row that has seen nothing yet has the maximum -inf; -inf minus -inf would be NaN.
    b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_rescale = tl.exp2(b_max - b_shift)
    b_weight = tl.exp2(b_scores - b_shift[:, None])
    b_sum = b_sum * b_rescale + tl.sum(b_weight, 1)
    b_out = b_out * b_rescale[:, None]
    b_out = tl.dot(b_weight.to(b_value.dtype), b_value, b_out, input_precision="ieee")
    return b_new_max, b_sum, b_out


@triton.jit
def attend_block(
    b_query,  # [BLOCK_M, BLOCK_D]
    b_word,  # [BLOCK_M]
    b_max,
    b_sum,
    b_out,
    key_ptr,  # the KV head's [T, head_size]
    value_ptr,  # the KV head's [T, head_size]
    first_row,
    num_columns,
    scale_log2,
    key_stride_t,
    value_stride_t,
    HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax steps over the block's own rows."""
    b_n = tl.arange(0, BLOCK_N)
    b_d = tl.arange(0, BLOCK_D)
    # Not pipelined: few steps, and no more shared memory than the context's.
    for first in tl.range(0, num_columns, BLOCK_N, num_stages=1):
        b_column = first + b_n
        is_column = b_column < num_columns
        n_mask = is_column[:, None] & (b_d < HEAD_SIZE)[None, :]
        b_row = first_row + b_column
        b_key_ptr = key_ptr + (b_row * key_stride_t)[:, None] + b_d[None, :]
        b_value_ptr = value_ptr + (b_row * value_stride_t)[:, None] + b_d[None, :]
        b_key = tl.load(b_key_ptr, mask=n_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_value = tl.load(b_value_ptr, mask=n_mask, other=0.0)
        is_allowed = ((b_word[:, None] >> b_column.to(tl.int64)[None, :]) & 1) != 0
        b_visible = is_allowed & is_column[None, :]
        b_max, b_sum, b_out = attend(
            b_query, b_key, b_value, b_visible, scale_log2, b_max, b_sum, b_out
        )
    return b_max, b_sum, b_out


@triton.jit
def attend_context(
    b_query,  # [BLOCK_M, BLOCK_D]
    b_max,
    b_sum,
    b_out,
    key_cache_ptr,  # the KV head's [num_pages, page_size, head_size]
    value_cache_ptr,  # the same of V, with K's strides
    table_ptr,  # the request's [max_blocks]
    first_token,
    num_tokens,
    num_skipped,  # tokens between the sinks and the window
    scale_log2,
    cache_stride_b,
    cache_stride_s,
    HEAD_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    VISIBLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax steps over `num_tokens` cached tokens, counted without those that are skipped."""
    b_n = tl.arange(0, BLOCK_N)
    b_d = tl.arange(0, BLOCK_D)
    # From 0, with the first token added inside: a loop from another start is not pipelined.
    for first in range(0, num_tokens, BLOCK_N):
        is_token = first + b_n < num_tokens
        b_position = first_token + first + b_n
        if VISIBLE:
            b_position += tl.where(b_position < SINKS, 0, num_skipped)
        b_index = b_position // PAGE_SIZE
        b_block = tl.load(table_ptr + b_index // PAGES_PER_BLOCK, mask=is_token, other=0)
        # Page id * stride passes 2**31 elements in any large cache.
        b_page = b_block.to(tl.int64) * PAGES_PER_BLOCK + b_index % PAGES_PER_BLOCK
        b_token = b_page * cache_stride_b + (b_position % PAGE_SIZE) * cache_stride_s
        b_place = b_token[:, None] + b_d[None, :]
        n_mask = is_token[:, None] & (b_d < HEAD_SIZE)[None, :]
        b_key = tl.load(key_cache_ptr + b_place, mask=n_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_value = tl.load(value_cache_ptr + b_place, mask=n_mask, other=0.0)
        b_max, b_sum, b_out = attend(
            b_query, b_key, b_value, is_token[None, :], scale_log2, b_max, b_sum, b_out
        )
    return b_max, b_sum, b_out


@triton.jit(do_not_specialize=["num_requests", "target_splits"])
def _block_attention_kernel(
    out_ptr,  # [T, num_heads, head_size]
    partial_out_ptr,  # [partials, num_kv_heads, max_rows, head_size] float32, not normalised
    partial_max_ptr,  # [partials, num_kv_heads, max_rows] float32, in splits of log 2
    partial_sum_ptr,  # [partials, num_kv_heads, max_rows] float32
    query_ptr,  # [T, num_heads, head_size]
    key_ptr,  # [T, num_kv_heads, head_size]
    value_ptr,  # [T, num_kv_heads, head_size]
    key_cache_ptr,  # [num_pages, num_kv_heads, page_size, head_size]
    value_cache_ptr,  # the same of V, with K's strides
    block_table_ptr,  # [R, max_blocks]
    context_lens_ptr,  # [R]
    block_start_loc_ptr,  # [R + 1]
    block_mask_ptr,  # [T] int64 words
    num_requests,
    target_splits,
    max_rows,  # rows of the longest block x query heads of one KV head
    scale_log2,  # softmax scale * log2(e)
    out_stride_t,
    out_stride_h,
    query_stride_t,
    query_stride_h,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    cache_stride_b,
    cache_stride_h,
    cache_stride_s,
    table_stride_r,
    IS_SPLIT: tl.constexpr,  # a program stands for a split of a request, not for the request
    MIN_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,  # pages of a block of the table
    SINKS: tl.constexpr,  # first tokens of a context that are seen whatever its length is
    VISIBLE: tl.constexpr,  # most context tokens that a request's rows see; 0: all
    BLOCK_R: tl.constexpr,  # requests per step of the search for a split
    BLOCK_M: tl.constexpr,  # rows of a tile: block rows x query heads of one KV head
    BLOCK_N: tl.constexpr,  # columns per step: tokens of the context or of the block
    BLOCK_D: tl.constexpr,  # head size, padded to a power of two
):
    # The tiles of a split follow each other: all but the first find its K/V in the L2 cache.
    num_tiles = tl.cdiv(max_rows, BLOCK_M)
    index = tl.program_id(0) // num_tiles
    first_m = (tl.program_id(0) % num_tiles) * BLOCK_M
    kv_head = tl.program_id(1).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    if IS_SPLIT:
        split_tokens = longest_split(
            context_lens_ptr, num_requests, target_splits, MIN_TOKENS, BLOCK_N, BLOCK_R, VISIBLE
        )
        request, part, partial = find_split(
            index, split_tokens, context_lens_ptr, num_requests, False, BLOCK_R, VISIBLE
        )
        if request >= num_requests:
            return
    else:
        request = index.to(tl.int64)

    first_row = tl.load(block_start_loc_ptr + request).to(tl.int64)
    num_rows = (tl.load(block_start_loc_ptr + request + 1) - first_row).to(tl.int32)
    if first_m >= num_rows * GROUP:
        return

    context_len = load_lens(context_lens_ptr, request, num_requests, VISIBLE)
    num_skipped = 0
    if VISIBLE:
        num_skipped = load_lens(context_lens_ptr, request, num_requests, 0) - context_len
    first_token, num_tokens, num_columns, num_parts = 0, context_len, num_rows, 1
    if IS_SPLIT:
        num_parts = tl.cdiv(context_len, split_tokens)
        # Of even size: a last part of a few tokens would cost a program and a partial result too.
        part_tokens = tl.cdiv(tl.cdiv(context_len, tl.maximum(num_parts, 1)), BLOCK_N) * BLOCK_N
        first_token = part * part_tokens
        num_tokens = tl.minimum(part_tokens, context_len - first_token)
        num_columns = tl.where(part == 0, num_rows, 0)  # the first part sees the block too

    b_m = first_m + tl.arange(0, BLOCK_M)
    b_d = tl.arange(0, BLOCK_D)
    is_m = b_m < num_rows * GROUP
    is_dim = b_d < HEAD_SIZE
    m_mask = is_m[:, None] & is_dim[None, :]
    b_row = first_row + b_m // GROUP
    b_head = kv_head * GROUP + b_m % GROUP
    b_query = tl.load(
        query_ptr + (b_row * query_stride_t + b_head * query_stride_h)[:, None] + b_d[None, :],
        mask=m_mask,
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    b_word = tl.load(block_mask_ptr + b_row, mask=is_m, other=0)  # [BLOCK_M]
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)

    b_max, b_sum, b_out = attend_block(
        b_query,
        b_word,
        b_max,
        b_sum,
        b_out,
        key_ptr + kv_head * key_stride_h,
        value_ptr + kv_head * value_stride_h,
        first_row,
        num_columns,
        scale_log2,
        key_stride_t,
        value_stride_t,
        HEAD_SIZE,
        BLOCK_N,
        BLOCK_D,
    )
    b_max, b_sum, b_out = attend_context(
        b_query,
        b_max,
        b_sum,
        b_out,
        key_cache_ptr + kv_head * cache_stride_h,
        value_cache_ptr + kv_head * cache_stride_h,
        block_table_ptr + request * table_stride_r,
        first_token,
        num_tokens,
        num_skipped,
        scale_log2,
        cache_stride_b,
        cache_stride_s,
        HEAD_SIZE,
        PAGE_SIZE,
        PAGES_PER_BLOCK,
        SINKS,
        VISIBLE,
        BLOCK_N,
        BLOCK_D,
    )

    if IS_SPLIT and num_parts > 1:
        b_partial = (partial * num_kv_heads + kv_head) * max_rows + b_m
        tl.store(partial_max_ptr + b_partial, b_max, mask=is_m)
        tl.store(partial_sum_ptr + b_partial, b_sum, mask=is_m)
        partial_out_ptrs = partial_out_ptr + (b_partial * HEAD_SIZE)[:, None] + b_d[None, :]
        tl.store(partial_out_ptrs, b_out, mask=m_mask)
        return
    # A row that saw nothing has sum 0 and output 0: keep the zeros.
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    out_ptrs = out_ptr + (b_row * out_stride_t + b_head * out_stride_h)[:, None] + b_d[None, :]
    tl.store(out_ptrs, b_out.to(out_ptr.dtype.element_ty), mask=m_mask)
