"""Writing K and V rows into the paged cache in Triton. Imports triton: load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, cuda

from specformer_kernels.kv_store.reference import check_arguments

# Elements of K (and as many of V) per program: 32 registers a thread each at four warps.
_TILE_ELEMENTS = 4096


@triton.jit
def _kv_store_kernel(
    key_ptr,  # [T, num_kv_heads, head_size]
    value_ptr,  # [T, num_kv_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, page_size, 2 * head_size]
    slot_mapping_ptr,  # [T] int64, -1 skips
    num_kv_heads,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    cache_stride_b,
    cache_stride_h,
    cache_stride_s,
    HEAD_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads per program
    BLOCK_D: tl.constexpr,  # head size, padded to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + row)
    if slot < 0:
        return

    b_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    b_d = tl.arange(0, BLOCK_D)
    mask = (b_h < num_kv_heads)[:, None] & (b_d < HEAD_SIZE)[None, :]
    b_key = tl.load(
        key_ptr + row * key_stride_t + (b_h * key_stride_h)[:, None] + b_d[None, :], mask=mask
    )  # [BLOCK_H, BLOCK_D]
    b_value = tl.load(
        value_ptr + row * value_stride_t + (b_h * value_stride_h)[:, None] + b_d[None, :], mask=mask
    )  # [BLOCK_H, BLOCK_D]

    # The slot is int64, so is every product: the cache passes 2**31 elements.
    token = (slot // PAGE_SIZE) * cache_stride_b + (slot % PAGE_SIZE) * cache_stride_s
    cache_ptrs = kv_cache_ptr + token + (b_h * cache_stride_h)[:, None] + b_d[None, :]
    tl.store(cache_ptrs, b_key, mask=mask)
    tl.store(cache_ptrs + HEAD_SIZE, b_value, mask=mask)


def tile_sizes(num_kv_heads: int, head_size: int) -> dict[str, int]:
    """Tile sizes: as many heads per program as the register budget holds."""
    block_d = triton.next_power_of_2(head_size)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, _TILE_ELEMENTS // block_d))
    return {"BLOCK_H": heads, "BLOCK_D": block_d}


def kv_store(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Launch the kernel: one program per row and tile of heads; no host sync.

    Shapes and dtypes as in `specformer_kernels.kv_store.kv_store`.
    """
    check_arguments(key, value, kv_cache, slot_mapping)
    num_rows, num_kv_heads, head_size = key.shape
    if key.numel() == 0:
        return
    tiles = tile_sizes(num_kv_heads, head_size)
    grid = (num_rows, triton.cdiv(num_kv_heads, tiles["BLOCK_H"]))
    with cuda.device_of(key):
        _kv_store_kernel[grid](
            key,
            value,
            kv_cache,
            slot_mapping,
            num_kv_heads,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.stride(2),
            HEAD_SIZE=head_size,
            PAGE_SIZE=kv_cache.shape[2],
            **tiles,
        )
