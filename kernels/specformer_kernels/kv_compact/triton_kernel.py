"""Moving K and V rows inside the paged cache in Triton. Load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, cuda

from specformer_kernels.kv_compact.reference import check_arguments

# Elements per program: 32 a thread at four warps.
_TILE_ELEMENTS = 4096


@triton.jit
def _slot_offsets(b_slot, cache_stride_b, cache_stride_s, PAGE_SIZE: tl.constexpr):
    # Slots are int64, so is every product: the cache passes 2**31 elements.
    return (b_slot // PAGE_SIZE) * cache_stride_b + (b_slot % PAGE_SIZE) * cache_stride_s


@triton.jit
def _kv_compact_kernel(
    kv_cache_ptr,  # [num_blocks, num_kv_heads, page_size, 2 * head_size]
    source_slots_ptr,  # [R, num_moves] int64, negative skips
    target_slots_ptr,  # [R, num_moves] int64, negative skips
    num_moves,
    row_size,  # 2 * head_size
    cache_stride_b,
    cache_stride_h,
    cache_stride_s,
    PAGE_SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,  # moves of a request, padded to a power of two
    BLOCK_D: tl.constexpr,  # elements of a row per program
):
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    b_l = tl.arange(0, BLOCK_L)
    is_move = b_l < num_moves
    b_source = tl.load(source_slots_ptr + request * num_moves + b_l, mask=is_move, other=-1)
    b_target = tl.load(target_slots_ptr + request * num_moves + b_l, mask=is_move, other=-1)
    # A row that stays where it is costs nothing.
    is_move = (b_source > -1) & (b_target > -1) & (b_source != b_target)

    b_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = is_move[:, None] & (b_d < row_size)[None, :]
    head_ptr = kv_cache_ptr + head * cache_stride_h
    b_from = _slot_offsets(b_source, cache_stride_b, cache_stride_s, PAGE_SIZE)
    b_to = _slot_offsets(b_target, cache_stride_b, cache_stride_s, PAGE_SIZE)
    b_row = tl.load(head_ptr + b_from[:, None] + b_d[None, :], mask=mask)  # [BLOCK_L, BLOCK_D]
    # Another warp may still have to read what this one overwrites.
    tl.debug_barrier()
    tl.store(head_ptr + b_to[:, None] + b_d[None, :], b_row, mask=mask)


def tile_sizes(num_moves: int, row_size: int) -> dict[str, int]:
    """Tile sizes: all moves, and as much of the row as the register budget holds."""
    block_l = triton.next_power_of_2(num_moves)
    block_d = min(triton.next_power_of_2(row_size), max(32, _TILE_ELEMENTS // block_l))
    return {"BLOCK_L": block_l, "BLOCK_D": block_d}


def kv_compact(kv_cache: Tensor, source_slots: Tensor, target_slots: Tensor) -> None:
    """Launch the kernel: one program per request, head and part of the row; no host sync.

    Shapes and dtypes as in `specformer_kernels.kv_compact.kv_compact`.
    """
    check_arguments(kv_cache, source_slots, target_slots)
    num_requests, num_moves = source_slots.shape
    _, num_kv_heads, page_size, row_size = kv_cache.shape
    if source_slots.numel() == 0 or kv_cache.numel() == 0:
        return
    tiles = tile_sizes(num_moves, row_size)
    grid = (num_requests, num_kv_heads, triton.cdiv(row_size, tiles["BLOCK_D"]))
    with cuda.device_of(kv_cache):
        _kv_compact_kernel[grid](
            kv_cache,
            source_slots,
            target_slots,
            num_moves,
            row_size,
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.stride(2),
            PAGE_SIZE=page_size,
            **tiles,
        )
