"""Rotating draft slots: kernel against the float64 reference, reference against `rotate`."""

from __future__ import annotations

import pytest
import torch
from specformer_kernels.kv_store import rotate
from specformer_kernels.rotate_slots import reference, rotate_slots, triton_kernel
from torch import Tensor

# Largest RMS error over RMS of the result in float64, for inputs already rounded to the dtype.
# float32: two products and a sum. float16 is rounded once; the interpreter truncates bfloat16.
ERROR_RATIO = {torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 8e-3}
POSITIONS = 64


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, extra_heads: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots as a view of a projection with further heads, a table, and anchors apart."""
    generator = torch.Generator().manual_seed(1)
    *leading, slots, heads, head_size = shape
    wide = torch.randn(*leading, slots, heads + extra_heads, head_size, generator=generator)
    angles = torch.rand(POSITIONS, head_size // 2, generator=generator, dtype=torch.float64) * 6
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    anchors = torch.randint(0, POSITIONS - slots, tuple(leading), generator=generator)
    return wide.to(dtype)[..., :heads, :], table, anchors


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 4, 2, 8), (1, 1, 1, 2), (2, 8, 5, 64), (2, 3, 2, 3, 6), (1, 2, 40, 256)], ids=str
)
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, kernel_device: str) -> None:
    x, table, anchors = make_inputs(shape, dtype, extra_heads=2)
    offsets = torch.arange(1, shape[-3] + 1)
    expected = rotate(x.double(), table.double(), anchors.unsqueeze(-1) + offsets)
    found = triton_kernel.rotate_slots(*(t.to(kernel_device) for t in (x, table, anchors)))
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert found.is_contiguous()
    error = (found.cpu().double() - expected).norm()
    assert error <= ERROR_RATIO[dtype] * expected.norm()  # NaN fails too
    torch.testing.assert_close(
        reference.rotate_slots(x, table, anchors).double(), expected, rtol=0.02, atol=0.02
    )


def test_no_slots(kernel_device: str) -> None:
    x, table, anchors = make_inputs((0, 3, 2, 8), torch.float32)
    inputs = (t.to(kernel_device) for t in (x, table, anchors))
    assert triton_kernel.rotate_slots(*inputs).shape == x.shape


def test_gradients_pass() -> None:
    x, table, anchors = make_inputs((2, 3, 2, 4), torch.float32)
    x.requires_grad_()
    rotate_slots(x, table, anchors).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps lengths


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x, t, a: (x[..., :7], t, a), "x: expected"),
        (lambda x, t, a: (x[0, 0], t, a), "x: expected"),
        (lambda x, t, a: (x, t.double(), a), "table: expected float32"),
        (lambda x, t, a: (x, t[:, :4], a), "table: expected float32"),
        (lambda x, t, a: (x.transpose(-1, -2).transpose(-1, -3), t, a), "expected"),
        (lambda x, t, a: (x, t, a[:1]), "anchor_positions: expected shape"),
        (lambda x, t, a: (x, t, a.int()), "anchor_positions: expected torch.int64"),
    ],
)
def test_bad_arguments_are_named(change, named: str) -> None:  # type: ignore[no-untyped-def]
    arguments = change(*make_inputs((2, 3, 2, 8), torch.float32))
    for implementation in (reference, triton_kernel):
        with pytest.raises(ValueError, match=named):
            implementation.rotate_slots(*arguments)


def test_float64_is_the_references_alone() -> None:
    x, table, anchors = make_inputs((2, 3, 2, 8), torch.float64)
    with pytest.raises(ValueError, match=r"x: .*float64"):
        triton_kernel.rotate_slots(x, table, anchors)
