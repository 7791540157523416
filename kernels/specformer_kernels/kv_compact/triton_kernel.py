"""Moving K and V rows inside the paged cache in Triton. Load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, cuda

from specformer_kernels.kv_compact.reference import cache_addresses, check_arguments

# Elements per program: 32 a thread at four warps.
_TILE_ELEMENTS = 4096


@triton.jit
def _slot_offsets(b_slot, cache_stride_b, cache_stride_s, PAGE_SIZE: tl.constexpr):
    # Slots are int64, so is every product: the cache passes 2**31 elements.
    return (b_slot // PAGE_SIZE) * cache_stride_b + (b_slot % PAGE_SIZE) * cache_stride_s


# How many nodes a step moves at most follows the batch, and so would the specialisations.
@triton.jit(
    do_not_specialize=["num_moves"],
    do_not_specialize_on_alignment=["source_slots_ptr", "target_slots_ptr"],
)
def _kv_compact_kernel(
    kv_cache_ptr,  # the first layer's, which tells the dtype
    addresses_ptr,  # [L] int64: [num_blocks, num_kv_heads, page_size, 2 * head_size] each
    source_slots_ptr,  # [R, num_moves] int64, negative skips
    target_slots_ptr,  # [R, num_moves] int64, negative skips
    num_moves,
    num_kv_heads,
    row_size,  # 2 * head_size
    cache_stride_b,
    cache_stride_h,
    cache_stride_s,
    PAGE_SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,  # moves of a request, padded to a power of two
    BLOCK_D: tl.constexpr,  # elements of a row per program
):
    request = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1) // num_kv_heads
    head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    b_l = tl.arange(0, BLOCK_L)
    is_move = b_l < num_moves
    b_source = tl.load(source_slots_ptr + request * num_moves + b_l, mask=is_move, other=-1)
    b_target = tl.load(target_slots_ptr + request * num_moves + b_l, mask=is_move, other=-1)
    # A row that stays where it is costs nothing.
    is_move = (b_source > -1) & (b_target > -1) & (b_source != b_target)

    b_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = is_move[:, None] & (b_d < row_size)[None, :]
    layer_ptr = tl.load(addresses_ptr + layer).to(kv_cache_ptr.dtype)
    head_ptr = layer_ptr + head * cache_stride_h
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


def kv_compact(
    kv_caches: Sequence[Tensor],
    source_slots: Tensor,
    target_slots: Tensor,
    addresses: Tensor | None = None,
) -> None:
    """Launch the kernel: one program per request, layer, head and part of the row; no host sync.

    Shapes and dtypes as in `specformer_kernels.kv_compact.kv_compact`.
    """
    check_arguments(kv_caches, source_slots, target_slots, addresses)
    num_requests, num_moves = source_slots.shape
    first = kv_caches[0]
    _, num_kv_heads, page_size, row_size = first.shape
    if source_slots.numel() == 0 or first.numel() == 0:
        return
    tiles = tile_sizes(num_moves, row_size)
    heads = len(kv_caches) * num_kv_heads
    grid = (num_requests, heads, triton.cdiv(row_size, tiles["BLOCK_D"]))
    with cuda.device_of(first):
        _kv_compact_kernel[grid](
            first,
            cache_addresses(kv_caches) if addresses is None else addresses,
            source_slots,
            target_slots,
            num_moves,
            num_kv_heads,
            row_size,
            first.stride(0),
            first.stride(1),
            first.stride(2),
            PAGE_SIZE=page_size,
            **tiles,
        )
