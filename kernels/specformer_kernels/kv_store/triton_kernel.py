"""Writing K and V rows into the paged cache in Triton. Imports triton: load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.kv_store.reference import check_arguments

# Elements of K (and as many of V) per program: 32 registers a thread each at four warps.
_TILE_ELEMENTS = 4096


@triton.jit
def rotated(
    b_first,  # [BLOCK_H, BLOCK_I] first half of every head
    b_second,  # the same of the second half
    angles_ptr,  # one row of the table: cosines, then sines
    b_i,
    HALF: tl.constexpr,
):
    b_cos = tl.load(angles_ptr + b_i, mask=b_i < HALF, other=0.0)[None, :]
    b_sin = tl.load(angles_ptr + HALF + b_i, mask=b_i < HALF, other=0.0)[None, :]
    b_x, b_y = b_first.to(tl.float32), b_second.to(tl.float32)
    b_first_rotated = (b_x * b_cos - b_y * b_sin).to(b_first.dtype)
    b_second_rotated = (b_y * b_cos + b_x * b_sin).to(b_second.dtype)
    return b_first_rotated, b_second_rotated


# Rows of a step and where they begin in their buffers must not make a step compile another variant.
@triton.jit(
    do_not_specialize=["num_key_programs"],
    do_not_specialize_on_alignment=["slot_mapping_ptr", "positions_ptr"],
)
def _kv_store_kernel(
    key_cache_ptr,  # [num_blocks, num_kv_heads, page_size, head_size]
    value_cache_ptr,  # the same of V, with K's strides
    query_out_ptr,  # [A, num_heads, head_size] contiguous, None without a query
    key_ptr,  # [T, num_kv_heads, head_size]
    value_ptr,  # [T, num_kv_heads, head_size]
    slot_mapping_ptr,  # [T] int64, negative skips
    query_ptr,  # [A, num_heads, head_size], or None
    rotary_table_ptr,  # [max_position, head_size] float32, or None: nothing is rotated
    positions_ptr,  # [T] int64, or None
    query_positions_ptr,  # [A] int64, or None
    num_key_programs,  # programs that store K and V; those after them rotate queries
    num_kv_heads,
    num_heads,
    cache_stride_b,
    cache_stride_h,
    cache_stride_s,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    query_stride_a,
    query_stride_h,
    table_stride_p,
    HEAD_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads per program
    BLOCK_I: tl.constexpr,  # half the head size, padded to a power of two
):
    half: tl.constexpr = (HEAD_SIZE + 1) // 2
    program = tl.program_id(0).to(tl.int64)
    b_heads = tl.arange(0, BLOCK_H)
    b_i = tl.arange(0, BLOCK_I)

    if query_ptr is not None and program >= num_key_programs:
        tiles = tl.cdiv(num_heads, BLOCK_H)
        row = (program - num_key_programs) // tiles
        b_h = (program - num_key_programs) % tiles * BLOCK_H + b_heads
        mask = (b_h < num_heads)[:, None] & (b_i < half)[None, :]
        query_ptrs = query_ptr + row * query_stride_a + (b_h * query_stride_h)[:, None]
        query_ptrs += b_i[None, :]
        b_first = tl.load(query_ptrs, mask=mask)  # [BLOCK_H, BLOCK_I]
        b_second = tl.load(query_ptrs + half, mask=mask)  # [BLOCK_H, BLOCK_I]
        position = tl.load(query_positions_ptr + row)
        angles_ptr = rotary_table_ptr + position * table_stride_p
        b_first, b_second = rotated(b_first, b_second, angles_ptr, b_i, half)
        out_ptrs = query_out_ptr + (row * num_heads + b_h)[:, None] * HEAD_SIZE + b_i[None, :]
        tl.store(out_ptrs, b_first, mask=mask)
        tl.store(out_ptrs + half, b_second, mask=mask)
        return

    tiles = tl.cdiv(num_kv_heads, BLOCK_H)
    row = program // tiles
    slot = tl.load(slot_mapping_ptr + row)
    if slot < 0:
        return
    b_h = program % tiles * BLOCK_H + b_heads
    # An odd head size, which cannot be rotated, has a second half shorter by one.
    mask = (b_h < num_kv_heads)[:, None] & (b_i < half)[None, :]
    second_mask = (b_h < num_kv_heads)[:, None] & (b_i < HEAD_SIZE - half)[None, :]
    key_ptrs = key_ptr + row * key_stride_t + (b_h * key_stride_h)[:, None] + b_i[None, :]
    value_ptrs = value_ptr + row * value_stride_t + (b_h * value_stride_h)[:, None] + b_i[None, :]
    b_first = tl.load(key_ptrs, mask=mask)  # [BLOCK_H, BLOCK_I]
    b_second = tl.load(key_ptrs + half, mask=second_mask)  # [BLOCK_H, BLOCK_I]
    b_value_first = tl.load(value_ptrs, mask=mask)  # [BLOCK_H, BLOCK_I]
    b_value_second = tl.load(value_ptrs + half, mask=second_mask)  # [BLOCK_H, BLOCK_I]
    if rotary_table_ptr is not None:
        position = tl.load(positions_ptr + row)
        angles_ptr = rotary_table_ptr + position * table_stride_p
        b_first, b_second = rotated(b_first, b_second, angles_ptr, b_i, half)

    # The slot is int64, so is every product: the cache passes 2**31 elements.
    token = (slot // PAGE_SIZE) * cache_stride_b + (slot % PAGE_SIZE) * cache_stride_s
    b_place = token + (b_h * cache_stride_h)[:, None] + b_i[None, :]
    tl.store(key_cache_ptr + b_place, b_first, mask=mask)
    tl.store(key_cache_ptr + b_place + half, b_second, mask=second_mask)
    tl.store(value_cache_ptr + b_place, b_value_first, mask=mask)
    tl.store(value_cache_ptr + b_place + half, b_value_second, mask=second_mask)


def tile_sizes(num_kv_heads: int, head_size: int) -> dict[str, int]:
    """Tile sizes: as many heads per program as the register budget holds."""
    block_i = triton.next_power_of_2(triton.cdiv(head_size, 2))
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, _TILE_ELEMENTS // (2 * block_i)))
    return {"BLOCK_H": heads, "BLOCK_I": block_i}


def kv_store(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    rotary_table: Tensor | None = None,
    positions: Tensor | None = None,
    query: Tensor | None = None,
    query_positions: Tensor | None = None,
    value_cache: Tensor | None = None,
) -> Tensor | None:
    """Launch the kernel: one program per row and tile of heads, of K and V and of the queries.

    Shapes and dtypes as in `specformer_kernels.kv_store.kv_store`, float64 excluded. No host sync.
    """
    key_pages, value_pages = check_arguments(
        key,
        value,
        kv_cache,
        slot_mapping,
        rotary_table,
        positions,
        query,
        query_positions,
        value_cache,
    )
    if key.dtype == torch.float64:
        raise ValueError("key: the kernel computes in float32, found torch.float64")
    num_rows, num_kv_heads, head_size = key.shape
    query_shape = (0, 0) if query is None else query.shape[:2]
    out = None if query is None else torch.empty(query.shape, dtype=key.dtype, device=key.device)
    tiles = tile_sizes(num_kv_heads, head_size)
    num_key_programs = num_rows * triton.cdiv(num_kv_heads, tiles["BLOCK_H"])
    num_query_programs = query_shape[0] * triton.cdiv(query_shape[1], tiles["BLOCK_H"])
    if num_key_programs + num_query_programs == 0:
        return out
    with torch.cuda.device_of(key):
        _kv_store_kernel[(num_key_programs + num_query_programs,)](
            key_pages,
            value_pages,
            out,
            key,
            value,
            slot_mapping,
            query,
            rotary_table,
            positions,
            query_positions,
            num_key_programs,
            num_kv_heads,
            query_shape[1],
            *kv_cache.stride()[:3],
            *key.stride()[:2],
            *value.stride()[:2],
            *((0, 0) if query is None else query.stride()[:2]),
            0 if rotary_table is None else rotary_table.stride(0),
            HEAD_SIZE=head_size,
            PAGE_SIZE=kv_cache.shape[2],
            **tiles,
        )
    return out
