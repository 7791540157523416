"""Attention with a block mask in Triton. Imports triton: load this module only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.block_attention.reference import check_arguments


@triton.jit
def _block_attention_kernel(
    out_ptr,  # [T, num_heads, head_size]
    query_ptr,  # [T, num_heads, head_size]
    key_ptr,  # [T, num_kv_heads, head_size]
    value_ptr,  # [T, num_kv_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, page_size, 2 * head_size]
    block_table_ptr,  # [R, max_blocks]
    context_lens_ptr,  # [R]
    block_start_loc_ptr,  # [R + 1]
    block_mask_ptr,  # [T] int64 words
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
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a tile: block rows x query heads of one KV head
    BLOCK_N: tl.constexpr,  # context tokens per step
    BLOCK_C: tl.constexpr,  # columns of the block, >= the longest block
    BLOCK_D: tl.constexpr,  # head size, padded to a power of two
):
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    first_row = tl.load(block_start_loc_ptr + request).to(tl.int64)
    num_rows = (tl.load(block_start_loc_ptr + request + 1) - first_row).to(tl.int32)
    first_m = tl.program_id(2) * BLOCK_M
    if first_m >= num_rows * GROUP:
        return

    b_m = first_m + tl.arange(0, BLOCK_M)
    b_d = tl.arange(0, BLOCK_D)
    is_dim = b_d < HEAD_SIZE
    is_m = b_m < num_rows * GROUP
    b_row = first_row + b_m // GROUP
    b_head = kv_head * GROUP + b_m % GROUP
    m_mask = is_m[:, None] & is_dim[None, :]

    b_query = tl.load(
        query_ptr + (b_row * query_stride_t + b_head * query_stride_h)[:, None] + b_d[None, :],
        mask=m_mask,
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    b_word = tl.load(block_mask_ptr + b_row, mask=is_m, other=0)  # [BLOCK_M]

    # The block goes first, so that it starts the online softmax and needs no rescaling.
    b_c = tl.arange(0, BLOCK_C)
    c_mask = (b_c < num_rows)[:, None] & is_dim[None, :]
    b_column = first_row + b_c
    b_own_key = tl.load(
        key_ptr + (b_column * key_stride_t + kv_head * key_stride_h)[:, None] + b_d[None, :],
        mask=c_mask,
        other=0.0,
    )  # [BLOCK_C, BLOCK_D]
    b_own_value = tl.load(
        value_ptr + (b_column * value_stride_t + kv_head * value_stride_h)[:, None] + b_d[None, :],
        mask=c_mask,
        other=0.0,
    )  # [BLOCK_C, BLOCK_D]
    is_allowed = ((b_word[:, None] >> b_c.to(tl.int64)[None, :]) & 1) != 0
    is_allowed = is_allowed & (b_c < num_rows)[None, :]
    # "ieee": tf32 would cost float32 serving its exactness against the reference.
    b_own_scores = tl.dot(b_query, tl.trans(b_own_key), input_precision="ieee") * scale_log2
    b_own_scores = tl.where(is_allowed, b_own_scores, float("-inf"))
    b_max = tl.max(b_own_scores, 1)
    # A row with no column has the maximum -inf; -inf minus -inf would be NaN.
    b_own_weight = tl.exp2(b_own_scores - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None])
    b_sum = tl.sum(b_own_weight, 1)
    b_out = tl.dot(b_own_weight.to(b_own_value.dtype), b_own_value, input_precision="ieee")

    context_len = tl.load(context_lens_ptr + request).to(tl.int32)
    table_ptr = block_table_ptr + request * table_stride_r
    cache_head_ptr = kv_cache_ptr + kv_head * cache_stride_h
    b_n = tl.arange(0, BLOCK_N)
    for start in range(0, context_len, BLOCK_N):
        b_position = start + b_n
        is_token = b_position < context_len
        # Block id * stride passes 2**31 elements in any large cache.
        b_page = tl.load(table_ptr + b_position // PAGE_SIZE, mask=is_token, other=0).to(tl.int64)
        b_token = b_page * cache_stride_b + (b_position % PAGE_SIZE) * cache_stride_s
        b_key_ptr = cache_head_ptr + b_token[:, None] + b_d[None, :]
        n_mask = is_token[:, None] & is_dim[None, :]
        b_key = tl.load(b_key_ptr, mask=n_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_value = tl.load(b_key_ptr + HEAD_SIZE, mask=n_mask, other=0.0)

        b_scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale_log2
        b_scores = tl.where(is_token[None, :], b_scores, float("-inf"))
        # Finite from here on: every step holds at least one visible token.
        b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
        b_rescale = tl.exp2(b_max - b_new_max)
        b_weight = tl.exp2(b_scores - b_new_max[:, None])
        b_sum = b_sum * b_rescale + tl.sum(b_weight, 1)
        b_out = b_out * b_rescale[:, None]
        b_out = tl.dot(b_weight.to(b_value.dtype), b_value, b_out, input_precision="ieee")
        b_max = b_new_max

    # A row that saw nothing has sum 0 and output 0: keep the zeros.
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    out_ptrs = out_ptr + (b_row * out_stride_t + b_head * out_stride_h)[:, None] + b_d[None, :]
    tl.store(out_ptrs, b_out.to(out_ptr.dtype.element_ty), mask=m_mask)


def tile_sizes(
    max_block_len: int, group: int, head_size: int, dtype: torch.dtype
) -> dict[str, int]:
    """Tile sizes, warps and stages: the largest that spill no register (tests/kernels/test_aot)."""
    block_d = max(16, triton.next_power_of_2(head_size))
    sizes = {"BLOCK_C": max(16, triton.next_power_of_2(max_block_len)), "BLOCK_D": block_d}
    # float32 multiplies without tensor cores and holds its operands in registers.
    if dtype == torch.float32:
        return sizes | {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    is_large = block_d > 128
    rows = max(16, triton.next_power_of_2(max_block_len * group))
    block_m = min(rows, 32 if is_large else 64)
    return sizes | {
        "BLOCK_M": block_m,
        "BLOCK_N": 32 if is_large else 64,
        "num_warps": 8 if is_large or block_m == 64 else 4,
        "num_stages": 2,
    }


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    block_start_loc: Tensor,
    block_mask: Tensor,
    scale: float,
    max_block_len: int,
) -> Tensor:
    """Launch the kernel: one program per request, KV head and tile of rows; no host sync.

    Shapes and dtypes as in `specformer_kernels.block_attention.block_attention`. The grid follows
    from shapes and `max_block_len` alone, so the launch can be captured in a CUDA graph.
    """
    check_arguments(
        query,
        key,
        value,
        kv_cache,
        block_table,
        context_lens,
        block_start_loc,
        block_mask,
        max_block_len,
    )
    if query.dtype == torch.float64:
        raise ValueError("query: the kernel computes in float32, found torch.float64")
    if block_table.stride(-1) != 1:
        raise ValueError(
            f"block_table: expected a contiguous last dimension, found {block_table.stride(-1)}"
        )
    num_requests, num_kv_heads = block_table.shape[0], key.shape[1]
    group = query.shape[1] // num_kv_heads
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    tiles = tile_sizes(max_block_len, group, query.shape[2], query.dtype)
    grid = (num_requests, num_kv_heads, triton.cdiv(max_block_len * group, tiles["BLOCK_M"]))
    with torch.cuda.device_of(query):
        _block_attention_kernel[grid](
            out,
            query,
            key,
            value,
            kv_cache,
            block_table,
            context_lens,
            block_start_loc,
            block_mask,
            scale * math.log2(math.e),
            out.stride(0),
            out.stride(1),
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.stride(2),
            block_table.stride(0),
            GROUP=group,
            HEAD_SIZE=query.shape[2],
            PAGE_SIZE=kv_cache.shape[2],
            **tiles,
        )
    return out
