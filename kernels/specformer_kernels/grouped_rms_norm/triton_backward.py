"""Gradients of `grouped_rms_norm` in Triton. Load only to launch.

Per row and group, with n = x / rms(x), s = grad * weight and means over the row:
    grad of x = (s - n * mean(s * n)) / rms(x)
    grad of weight = sum over the rows of grad * n
"""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The longest row a program holds whole: input, gradient, weight and sum take 64 registers a thread.
MAX_FUSED_SIZE = 8192
# A longer row is cut into tiles of this size.
TILE_SIZE = 4096
# Rows of one program: few enough programs to keep the partial sums small, enough to fill a GPU.
# From the shape alone, so that the weight's gradient is the same on every device.
MIN_STRIP, MAX_STRIPS = 4, 128


@triton.jit
def load_floats(ptr, b_d, mask):
    return tl.load(ptr + b_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_statistics(
    sum_squares,
    sum_products,  # of the row and its scaled gradient
    eps,
    HIDDEN_SIZE: tl.constexpr,
):
    """1 / rms(x) and mean(s * n)."""
    inverse_rms = tl.rsqrt(sum_squares / HIDDEN_SIZE + eps)
    return inverse_rms, sum_products / HIDDEN_SIZE * inverse_rms


@triton.jit
def _grouped_rms_norm_statistics_kernel(
    statistics_ptr,  # [T, G, 2]
    out_grad_ptr,  # [T, G * hidden_size]
    hidden_ptrs,  # tuple of G, each [T, hidden_size]
    weight_ptr,  # [G, hidden_size]
    hidden_strides,  # tuple of G row strides
    out_grad_stride_t,
    weight_stride_g,
    eps,
    NUM_GROUPS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for group in tl.static_range(NUM_GROUPS):
        if tl.program_id(1) == group:
            hidden_ptr = hidden_ptrs[group] + row * hidden_strides[group]
            grad_ptr = out_grad_ptr + row * out_grad_stride_t + group * HIDDEN_SIZE
            b_squares = tl.zeros([BLOCK_D], tl.float32)
            b_products = tl.zeros([BLOCK_D], tl.float32)
            for start in range(0, HIDDEN_SIZE, BLOCK_D):
                b_d = start + tl.arange(0, BLOCK_D)
                mask = b_d < HIDDEN_SIZE
                b_hidden = load_floats(hidden_ptr, b_d, mask)
                b_grad = load_floats(grad_ptr, b_d, mask)
                b_weight = load_floats(weight_ptr + group * weight_stride_g, b_d, mask)
                b_squares += b_hidden * b_hidden
                b_products += b_hidden * b_grad * b_weight
            inverse_rms, mean_product = row_statistics(
                tl.sum(b_squares, 0), tl.sum(b_products, 0), eps, HIDDEN_SIZE
            )
            place = 2 * (row * NUM_GROUPS + group)
            tl.store(statistics_ptr + place, inverse_rms)
            tl.store(statistics_ptr + place + 1, mean_product)


@triton.jit
def _grouped_rms_norm_backward_kernel(
    hidden_grad_ptrs,  # tuple of G, each [T, hidden_size] contiguous, or None: not wanted
    partial_ptr,  # [strips, G, hidden_size] float32, or None: the weight's is not wanted
    out_grad_ptr,  # [T, G * hidden_size]
    hidden_ptrs,  # tuple of G, each [T, hidden_size]
    weight_ptr,  # [G, hidden_size]
    statistics_ptr,  # [T, G, 2], or None: one tile is the whole row
    hidden_strides,  # tuple of G row strides
    out_grad_stride_t,
    weight_stride_g,
    num_rows,
    rows_per_strip,
    eps,
    NUM_GROUPS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    b_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = b_d < HIDDEN_SIZE
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, num_rows)
    # A tuple takes constant indices only, so each group has its own branch.
    for group in tl.static_range(NUM_GROUPS):
        if tl.program_id(1) == group:
            hidden_grad_ptr = hidden_grad_ptrs[group]
            if hidden_grad_ptr is not None or partial_ptr is not None:
                b_weight = load_floats(weight_ptr + group * weight_stride_g, b_d, mask)
                b_weight_grad = tl.zeros([BLOCK_D], tl.float32)
                for row in range(first, last):
                    hidden_row = hidden_ptrs[group] + row * hidden_strides[group]
                    grad_row = out_grad_ptr + row * out_grad_stride_t + group * HIDDEN_SIZE
                    b_hidden = load_floats(hidden_row, b_d, mask)
                    b_grad = load_floats(grad_row, b_d, mask)
                    b_scaled = b_grad * b_weight
                    if statistics_ptr is None:
                        inverse_rms, mean_product = row_statistics(
                            tl.sum(b_hidden * b_hidden, 0),
                            tl.sum(b_hidden * b_scaled, 0),
                            eps,
                            HIDDEN_SIZE,
                        )
                    else:
                        place = 2 * (row * NUM_GROUPS + group)
                        inverse_rms = tl.load(statistics_ptr + place)
                        mean_product = tl.load(statistics_ptr + place + 1)
                    b_normed = b_hidden * inverse_rms
                    b_weight_grad += b_grad * b_normed
                    if hidden_grad_ptr is not None:
                        b_hidden_grad = (b_scaled - b_normed * mean_product) * inverse_rms
                        tl.store(
                            hidden_grad_ptr + row * HIDDEN_SIZE + b_d,
                            b_hidden_grad.to(hidden_grad_ptr.dtype.element_ty),
                            mask=mask,
                        )
                if partial_ptr is not None:
                    place = (strip * NUM_GROUPS + group) * HIDDEN_SIZE
                    tl.store(partial_ptr + place + b_d, b_weight_grad, mask=mask)


def tile_sizes(hidden_size: int) -> dict[str, int]:
    """Tile size and warps: the whole row if it fits, about sixteen elements a thread."""
    fits = hidden_size <= MAX_FUSED_SIZE
    block_d = triton.next_power_of_2(hidden_size) if fits else TILE_SIZE
    return {"BLOCK_D": block_d, "num_warps": min(16, max(1, block_d // 512))}


def rows_per_strip(num_rows: int) -> int:
    return max(MIN_STRIP, triton.cdiv(num_rows, MAX_STRIPS))


def grouped_rms_norm_backward(
    out_grad: Tensor,
    hidden_states: Sequence[Tensor],
    weight: Tensor,
    eps: float,
    wants_hidden: Sequence[bool],
    wants_weight: bool,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Launch the kernels: one program per strip of rows, group and tile of columns; no host sync.

    Args:
        out_grad: [T, G * H], last dimension contiguous, like the rest below.
        hidden_states: G tensors [T, H], as the forward took them.
        weight: [G, H].
        eps: as in the forward.
        wants_hidden: which of the hidden states want a gradient.
        wants_weight: whether the weight wants one.

    Returns:
        The gradients of the hidden states, in their dtype, and of the weight, in its own; None
        where none is wanted. The weight's is summed in a fixed order, without atomics.
    """
    num_rows, hidden_size = hidden_states[0].shape
    num_groups, device = len(hidden_states), out_grad.device
    hidden_grads = [
        torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if wanted else None
        for hidden, wanted in zip(hidden_states, wants_hidden, strict=True)
    ]
    strip = rows_per_strip(num_rows)
    num_strips = triton.cdiv(num_rows, strip)
    shape = (num_strips, num_groups, hidden_size)
    partials = torch.empty(shape, dtype=torch.float32, device=device) if wants_weight else None
    if hidden_states[0].numel():
        with torch.cuda.device_of(out_grad):
            _launch(out_grad, hidden_states, weight, eps, tuple(hidden_grads), partials, strip)
    return hidden_grads, None if partials is None else partials.sum(0).to(weight.dtype)


def _launch(
    out_grad: Tensor,
    hidden_states: Sequence[Tensor],
    weight: Tensor,
    eps: float,
    hidden_grads: tuple[Tensor | None, ...],
    partials: Tensor | None,
    strip: int,
) -> None:
    num_rows, hidden_size = hidden_states[0].shape
    num_groups = len(hidden_states)
    strides = (tuple(h.stride(0) for h in hidden_states), out_grad.stride(0), weight.stride(0))
    tiles: dict[str, Any] = tile_sizes(hidden_size)
    tiles |= {"NUM_GROUPS": num_groups, "HIDDEN_SIZE": hidden_size}
    num_tiles = triton.cdiv(hidden_size, tiles["BLOCK_D"])
    inputs = (out_grad, tuple(hidden_states), weight)
    statistics = None
    if num_tiles > 1:
        shape = (num_rows, num_groups, 2)
        statistics = torch.empty(shape, dtype=torch.float32, device=out_grad.device)
        _grouped_rms_norm_statistics_kernel[(num_rows, num_groups)](
            statistics, *inputs, *strides, eps, **tiles
        )
    _grouped_rms_norm_backward_kernel[(triton.cdiv(num_rows, strip), num_groups, num_tiles)](
        hidden_grads, partials, *inputs, statistics, *strides, num_rows, strip, eps, **tiles
    )
