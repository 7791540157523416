"""Rotary embedding of draft slots in Triton. Imports triton: load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.kv_store.triton_kernel import rotated
from specformer_kernels.rotate_slots.reference import check_arguments

# Elements per program: 16 registers a thread at four warps, and programs enough for few slots.
_TILE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_slots"])
def _rotate_slots_kernel(
    out_ptr,  # [R, n, num_heads, head_size] contiguous
    x_ptr,  # [R, n, num_heads, head_size]
    table_ptr,  # [max_position, head_size] float32: cosines, then sines
    anchor_positions_ptr,  # [R] int64
    num_slots,
    num_heads,
    x_stride_r,
    x_stride_n,
    x_stride_h,
    table_stride_p,
    HEAD_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads per program
    BLOCK_I: tl.constexpr,  # half the head size, padded to a power of two
):
    half: tl.constexpr = HEAD_SIZE // 2
    tiles = tl.cdiv(num_heads, BLOCK_H)
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    request, slot = row // num_slots, row % num_slots
    b_h = program % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    b_i = tl.arange(0, BLOCK_I)
    mask = (b_h < num_heads)[:, None] & (b_i < half)[None, :]
    x_ptrs = x_ptr + request * x_stride_r + slot * x_stride_n
    x_ptrs = x_ptrs + (b_h * x_stride_h)[:, None] + b_i[None, :]
    b_first = tl.load(x_ptrs, mask=mask)  # [BLOCK_H, BLOCK_I]
    b_second = tl.load(x_ptrs + half, mask=mask)  # [BLOCK_H, BLOCK_I]
    position = tl.load(anchor_positions_ptr + request) + 1 + slot
    angles_ptr = table_ptr + position * table_stride_p
    b_first, b_second = rotated(b_first, b_second, angles_ptr, b_i, half)
    out_ptrs = out_ptr + (row * num_heads + b_h)[:, None] * HEAD_SIZE + b_i[None, :]
    tl.store(out_ptrs, b_first, mask=mask)
    tl.store(out_ptrs + half, b_second, mask=mask)


def tile_sizes(num_heads: int, head_size: int) -> dict[str, int]:
    """Tile sizes: as many heads per program as the register budget holds."""
    block_i = triton.next_power_of_2(head_size // 2)
    heads = min(triton.next_power_of_2(num_heads), max(1, _TILE_ELEMENTS // (2 * block_i)))
    return {"BLOCK_H": heads, "BLOCK_I": block_i}


def rotate_slots(x: Tensor, table: Tensor, anchor_positions: Tensor) -> Tensor:
    """Launch the kernel: one program per slot and tile of heads. No host sync.

    Shapes and dtypes as in `specformer_kernels.rotate_slots.rotate_slots`, float64 excluded.
    """
    check_arguments(x, table, anchor_positions)
    if x.dtype == torch.float64:
        raise ValueError("x: the kernel computes in float32, found torch.float64")
    num_slots, num_heads, head_size = x.shape[-3:]
    rows = x.reshape(-1, num_slots, num_heads, head_size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tiles = tile_sizes(num_heads, head_size)
    grid = (len(rows) * num_slots * triton.cdiv(num_heads, tiles["BLOCK_H"]),)
    with torch.cuda.device_of(x):
        _rotate_slots_kernel[grid](
            out,
            rows,
            table,
            anchor_positions.reshape(-1),
            num_slots,
            num_heads,
            *rows.stride()[:3],
            table.stride(0),
            HEAD_SIZE=head_size,
            **tiles,
        )
    return out
