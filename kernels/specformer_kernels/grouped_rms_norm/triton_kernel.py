"""RMSNorm of several hidden states, side by side, in Triton. Load only to launch."""

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
from torch.autograd.function import once_differentiable

from specformer_kernels.grouped_rms_norm.reference import check_arguments
from specformer_kernels.grouped_rms_norm.triton_backward import grouped_rms_norm_backward

# A row and its weights are held in registers whole: 64 a thread at 16 warps. Twice as much spills.
MAX_HIDDEN_SIZE = 16384


@triton.jit
def _grouped_rms_norm_kernel(
    out_ptr,  # [T, G * hidden_size]
    hidden_ptrs,  # tuple of G, each [T, hidden_size]
    weight_ptr,  # [G, hidden_size]
    hidden_strides,  # tuple of G row strides
    out_stride_t,
    weight_stride_g,
    eps,
    NUM_GROUPS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,  # hidden size, padded to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    b_d = tl.arange(0, BLOCK_D)
    mask = b_d < HIDDEN_SIZE
    # A tuple takes constant indices only, so each group has its own branch.
    for group in tl.static_range(NUM_GROUPS):
        if tl.program_id(1) == group:
            hidden_ptr = hidden_ptrs[group] + row * hidden_strides[group]
            b_hidden = tl.load(hidden_ptr + b_d, mask=mask, other=0.0).to(tl.float32)
            # Before the sum, so that a small batch waits for memory once.
            b_weight = tl.load(weight_ptr + group * weight_stride_g + b_d, mask=mask, other=0.0)
            inverse_rms = tl.rsqrt(tl.sum(b_hidden * b_hidden, 0) / HIDDEN_SIZE + eps)
            b_out = b_hidden * inverse_rms * b_weight.to(tl.float32)
            out_ptrs = out_ptr + row * out_stride_t + group * HIDDEN_SIZE + b_d
            tl.store(out_ptrs, b_out.to(out_ptr.dtype.element_ty), mask=mask)


def tile_sizes(hidden_size: int) -> dict[str, int]:
    """Tile size and warps for one row: about sixteen elements a thread."""
    block_d = triton.next_power_of_2(hidden_size)
    return {"BLOCK_D": block_d, "num_warps": min(16, max(1, block_d // 512))}


def grouped_rms_norm(hidden_states: Sequence[Tensor], weight: Tensor, eps: float) -> Tensor:
    """Normalise by one program per row and group; differentiable once, no host sync.

    Shapes and dtypes as in `specformer_kernels.grouped_rms_norm.grouped_rms_norm`; hidden_size is
    at most MAX_HIDDEN_SIZE and float64 is refused.
    """
    check_arguments(hidden_states, weight)
    shape, dtype = hidden_states[0].shape, hidden_states[0].dtype
    if shape[-1] > MAX_HIDDEN_SIZE:
        raise ValueError(
            f"hidden_states: expected hidden_size of at most {MAX_HIDDEN_SIZE}, found {shape[-1]}"
        )
    if dtype == torch.float64:
        raise ValueError("hidden_states: the kernel computes in float32, found torch.float64")
    rows = [_contiguous_rows(hidden) for hidden in hidden_states]
    out = _GroupedRMSNorm.apply(eps, _contiguous_rows(weight), *rows)
    return out.view(*shape[:-1], out.shape[-1])


class _GroupedRMSNorm(torch.autograd.Function):
    """Saves its inputs only: the backward holds each row anyway and takes its statistics again."""

    @staticmethod
    def forward(ctx: Any, eps: float, weight: Tensor, *hidden_states: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *hidden_states)
        ctx.eps = eps
        return _launch(hidden_states, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *hidden_states = ctx.saved_tensors
        _, wants_weight, *wants_hidden = ctx.needs_input_grad
        hidden_grads, weight_grad = grouped_rms_norm_backward(
            _contiguous_rows(out_grad), hidden_states, weight, ctx.eps, wants_hidden, wants_weight
        )
        return None, weight_grad, *hidden_grads


def _launch(hidden_states: Sequence[Tensor], weight: Tensor, eps: float) -> Tensor:
    first = hidden_states[0]
    num_rows, hidden_size = first.shape
    num_groups = len(hidden_states)
    shape = (num_rows, num_groups * hidden_size)
    out = torch.empty(shape, dtype=first.dtype, device=first.device)
    if out.numel():
        with torch.cuda.device_of(out):
            _grouped_rms_norm_kernel[(num_rows, num_groups)](
                out,
                tuple(hidden_states),
                weight,
                tuple(hidden.stride(0) for hidden in hidden_states),
                out.stride(0),
                weight.stride(0),
                eps,
                NUM_GROUPS=num_groups,
                HIDDEN_SIZE=hidden_size,
                **tile_sizes(hidden_size),
            )
    return out


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """View as [rows, size] with a contiguous last dimension; copies only if it is not."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
