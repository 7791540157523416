"""The gate of a SwiGLU layer: kernel against the float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from specformer_kernels.swiglu import reference, swiglu, triton_kernel

# Largest RMS error over RMS of the result in float64: the sigmoid in float32, and one rounding to
# the dtype, which the interpreter truncates for bfloat16.
ERROR_RATIO = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("inner", [1, 63, 1024, 1500])
@pytest.mark.parametrize("leading", [(3,), (1,), (2, 4), ()], ids=str)
def test_matches_reference(
    leading: tuple[int, ...], inner: int, dtype: torch.dtype, kernel_device: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(*leading, 2 * inner + 3, generator=generator).mul(4).to(dtype)
    gate_up = rows[..., : 2 * inner]  # rows wider than they need be
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = F.silu(gate) * up
    found = triton_kernel.swiglu(gate_up.to(kernel_device))
    assert found.shape == (*leading, inner)
    assert found.dtype == dtype
    error = (found.cpu().double() - expected).norm()
    assert error <= ERROR_RATIO[dtype] * expected.norm()  # NaN fails too
    assert torch.equal(reference.swiglu(gate_up.double()), expected)


def test_no_rows(kernel_device: str) -> None:
    assert triton_kernel.swiglu(torch.empty(0, 6, device=kernel_device)).shape == (0, 3)


def test_gradients_pass() -> None:
    gate_up = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, gate_up)


def test_bad_arguments_are_named() -> None:
    for implementation in (reference, triton_kernel):
        with pytest.raises(ValueError, match="gate_up: expected"):
            implementation.swiglu(torch.zeros(2, 5))
        with pytest.raises(ValueError, match="gate_up: expected a contiguous"):
            implementation.swiglu(torch.zeros(6, 4).t())
    with pytest.raises(ValueError, match="float64"):
        triton_kernel.swiglu(torch.zeros(2, 6, dtype=torch.float64))
