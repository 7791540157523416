"""The gate of a SwiGLU layer in Triton. Imports triton: load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.swiglu.reference import check_arguments


@triton.jit
def _swiglu_kernel(
    out_ptr,  # [rows, inner] contiguous
    gate_up_ptr,  # [rows, 2 * inner]
    inner,
    row_stride,
    BLOCK: tl.constexpr,  # columns per program
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < inner
    gate_ptrs = gate_up_ptr + row * row_stride + columns
    b_gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    b_up = tl.load(gate_ptrs + inner, mask=mask, other=0.0).to(tl.float32)
    b_wide = b_gate.to(tl.float32)
    b_out = b_wide * tl.sigmoid(b_wide) * b_up
    tl.store(out_ptr + row * inner + columns, b_out.to(b_gate.dtype), mask=mask)


def tile_sizes(inner: int) -> dict[str, int]:
    """Tile sizes: few columns per program, since a draft step has few rows to fill a GPU with."""
    return {"BLOCK": min(1024, triton.next_power_of_2(inner))}


def swiglu(gate_up: Tensor) -> Tensor:
    """Launch the kernel: one program per row and tile of columns. No host sync.

    Shapes as in `specformer_kernels.swiglu.swiglu`, float64 excluded.
    """
    check_arguments(gate_up)
    if gate_up.dtype == torch.float64:
        raise ValueError("gate_up: the kernel computes in float32, found torch.float64")
    inner = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * inner)
    shape = (*gate_up.shape[:-1], inner)
    out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    if not out.numel():
        return out
    tiles = tile_sizes(inner)
    with torch.cuda.device_of(gate_up):
        _swiglu_kernel[(len(rows), triton.cdiv(inner, tiles["BLOCK"]))](
            out, rows, inner, rows.stride(0), **tiles
        )
    return out
