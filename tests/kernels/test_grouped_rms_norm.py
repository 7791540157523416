"""Grouped RMSNorm: kernel against the float64 reference, reference against PyTorch's own norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from specformer_kernels.grouped_rms_norm import grouped_rms_norm, reference, triton_kernel
from torch import Tensor

# Largest RMS error over RMS of the float64 result, for inputs already rounded to the dtype.
# float32: two multiplications and a mean keep an error near one rounding, 6e-8.
# float16: the output is rounded once, 2**-11 at most.
# bfloat16: the interpreter truncates the output where a GPU rounds, 2**-7 at most.
ERROR_RATIO = {torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 8e-3}
EPS = 1e-6


def make_inputs(
    num_groups: int, num_rows: int, hidden_size: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Groups of very different size, as layers of a model are, in rows wider than they need be."""
    generator = torch.Generator().manual_seed(42)
    hidden_states = [
        (torch.randn(num_rows, hidden_size + 8 * group, generator=generator) * 8.0**group).to(
            dtype
        )[:, :hidden_size]
        for group in range(num_groups)
    ]
    return hidden_states, torch.randn(num_groups, hidden_size, generator=generator).to(dtype)


def check_kernel(hidden_states: list[Tensor], weight: Tensor, device: str) -> None:
    expected = reference.grouped_rms_norm(
        [hidden.double() for hidden in hidden_states], weight.double(), EPS
    )
    found = triton_kernel.grouped_rms_norm(
        [hidden.to(device) for hidden in hidden_states], weight.to(device), EPS
    )
    assert found.shape == expected.shape
    assert found.dtype == hidden_states[0].dtype
    error = (found.cpu().double() - expected).norm()
    assert error <= ERROR_RATIO[found.dtype] * expected.norm()  # NaN fails too


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 63, 256, 1000])
@pytest.mark.parametrize(("num_groups", "num_rows"), [(1, 3), (4, 1), (4, 7), (5, 2)])
def test_matches_reference(
    num_groups: int, num_rows: int, hidden_size: int, dtype: torch.dtype, kernel_device: str
) -> None:
    check_kernel(*make_inputs(num_groups, num_rows, hidden_size, dtype), kernel_device)


def test_weight_of_another_dtype(kernel_device: str) -> None:
    hidden_states, weight = make_inputs(3, 2, 100, torch.bfloat16)
    check_kernel(hidden_states, weight.float(), kernel_device)


def test_leading_dimensions_and_transposed_rows(kernel_device: str) -> None:
    hidden_states, weight = make_inputs(2, 6, 40, torch.float32)
    hidden_states[1] = hidden_states[1].mT.contiguous().mT
    flat = reference.grouped_rms_norm(hidden_states, weight, EPS)
    shaped = [hidden.unflatten(0, (2, 3)).to(kernel_device) for hidden in hidden_states]
    found = triton_kernel.grouped_rms_norm(shaped, weight.to(kernel_device), EPS)
    assert found.shape == (2, 3, 80)
    torch.testing.assert_close(found.flatten(0, 1).cpu(), flat)


def test_no_rows_and_zero_rows(kernel_device: str) -> None:
    weight = torch.ones(2, 64, device=kernel_device)
    none = [torch.zeros(0, 64, device=kernel_device)] * 2
    zero = [torch.zeros(1, 64, device=kernel_device)] * 2
    assert triton_kernel.grouped_rms_norm(none, weight, EPS).shape == (0, 128)
    assert torch.equal(triton_kernel.grouped_rms_norm(zero, weight, EPS), weight.view(1, 128) * 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_matches_the_definition(dtype: torch.dtype) -> None:
    hidden_states, weight = make_inputs(4, 5, 63, dtype)
    expected = [
        F.rms_norm(hidden, (63,), scale, EPS)
        for hidden, scale in zip(hidden_states, weight, strict=True)
    ]
    found = reference.grouped_rms_norm(hidden_states, weight, EPS)
    torch.testing.assert_close(found, torch.cat(expected, dim=-1))


def test_gradients() -> None:
    hidden_states, weight = make_inputs(2, 3, 5, torch.float64)
    inputs = [tensor.clone().requires_grad_() for tensor in (*hidden_states, weight)]
    assert torch.autograd.gradcheck(lambda a, b, w: grouped_rms_norm([a, b], w, EPS), inputs)


@pytest.mark.parametrize("implementation", [reference, triton_kernel], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden_states", lambda states, weight: ([], weight)),
        ("hidden_states[1]", lambda states, weight: ([states[0], states[1][:1]], weight)),
        ("hidden_states[1]", lambda states, weight: ([states[0], states[1].half()], weight)),
        ("weight", lambda states, weight: (states, weight[:1])),
        ("weight", lambda states, weight: (states, weight[:, :-1])),
    ],
)
def test_refuses_arguments(name: str, change, implementation) -> None:
    arguments = change(*make_inputs(2, 3, 16, torch.float32))
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the name is checked below
        implementation.grouped_rms_norm(*arguments, EPS)
    assert str(refused.value).startswith(f"{name}: expected")
