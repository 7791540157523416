"""Calls of grouped_rms_norm: four hooked states, forward and backward.

Hidden sizes: of a 32B target, and the longest, which a backward program does not hold whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from specformer_kernels.grouped_rms_norm import reference, triton_backward, triton_kernel

from kernel_cases import BenchCase, compiled, rounding

NUM_ROWS, NUM_GROUPS, EPS = 16, 4, 1e-6
# Aimed at where bytes, not launches, take the time.
AIM, AIM_ROWS = 0.85, 8192


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for size in (5120, triton_kernel.MAX_HIDDEN_SIZE):
        _, hidden, weight = _inputs(size, dtype)
        yield f"hidden {size}", partial(triton_kernel.grouped_rms_norm, hidden, weight, EPS)
        yield f"backward {size}", _backward(size, dtype, wants_hidden=True)
    # A head over a frozen target wants no gradient of the hooked states.
    yield "backward of the weight 5120", _backward(5120, dtype, wants_hidden=False)


def _inputs(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    hidden = [torch.zeros(NUM_ROWS, size, dtype=dtype) for _ in range(NUM_GROUPS)]
    out_grad = torch.zeros(NUM_ROWS, NUM_GROUPS * size, dtype=dtype)
    return out_grad, hidden, torch.ones(NUM_GROUPS, size, dtype=dtype)


def _backward(size: int, dtype: torch.dtype, wants_hidden: bool) -> Callable[[], object]:
    wanted = [wants_hidden] * NUM_GROUPS
    return partial(
        triton_backward.grouped_rms_norm_backward, *_inputs(size, dtype), EPS, wanted, True
    )


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Verification steps of 1 to 128 requests with 8 drafts, a prefill, and a training batch."""
    size, rows, training = 4096, [9, 144, 576, 1152, 8192], 8192
    if device == "cpu":
        size, rows, training = 80, [3], 5
    elif quick:
        rows = [576, 8192]
    tolerance = rounding(dtype)
    for count in rows:
        n, group = count * NUM_GROUPS * size, NUM_GROUPS * size
        yield BenchCase(
            name=f"{count} rows",
            inputs=partial(_random_inputs, count, size, dtype, device),
            kernel=triton_kernel.grouped_rms_norm,
            reference=reference.grouped_rms_norm,
            least_bytes=(2 * n + group) * dtype.itemsize,
            launches=1,
            tolerance=tolerance,
            aim=AIM if count >= AIM_ROWS else None,
            alternatives={"torch.compile": compiled(reference.grouped_rms_norm)},
        )
    n, group = training * NUM_GROUPS * size, NUM_GROUPS * size
    for name, wants_hidden, least in (
        ("all gradients", True, 5 * n + 3 * group),
        ("gradient of the weight", False, 4 * n + 2 * group),
    ):
        compiled_norm = compiled(reference.grouped_rms_norm)
        yield BenchCase(
            name=f"{training} rows, {name}",
            inputs=partial(_training_inputs, training, size, dtype, device, wants_hidden),
            kernel=partial(_step, triton_kernel.grouped_rms_norm),
            reference=partial(_step, reference.grouped_rms_norm),
            least_bytes=least * dtype.itemsize,
            launches=4,  # forward, backward, the sum of the strips and its rounding
            tolerance=tolerance,
            aim=AIM if training >= AIM_ROWS else None,
            alternatives={
                "torch.compile": replace(compiled_norm, call=partial(_step, compiled_norm.call))
            },
        )


def _random_inputs(
    rows: int, size: int, dtype: torch.dtype, device: str
) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    return [draw(rows, size) for _ in range(NUM_GROUPS)], draw(NUM_GROUPS, size), EPS


def _training_inputs(
    rows: int, size: int, dtype: torch.dtype, device: str, wants_hidden: bool
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, float]:
    hidden, weight, eps = _random_inputs(rows, size, dtype, device)
    for state in hidden:
        state.requires_grad_(wants_hidden)
    out_grad = torch.randn(rows, NUM_GROUPS * size, dtype=dtype, device=device)
    return out_grad, hidden, weight.requires_grad_(), eps


def _step(
    norm: Callable[..., torch.Tensor],
    out_grad: torch.Tensor,
    hidden: list[torch.Tensor],
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Forward and backward."""
    out = norm(hidden, weight, eps)
    wanted = [tensor for tensor in (weight, *hidden) if tensor.requires_grad]
    return out.detach(), *torch.autograd.grad(out, wanted, out_grad)
