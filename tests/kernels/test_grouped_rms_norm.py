"""Grouped RMSNorm: kernel against the float64 reference, reference against PyTorch's own norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from specformer_kernels.grouped_rms_norm import (
    grouped_rms_norm,
    reference,
    triton_backward,
    triton_kernel,
)
from torch import Tensor

# Largest RMS error over RMS of the float64 result, for inputs already rounded to the dtype.
# float32: two multiplications and a mean keep an error near one rounding, 6e-8.
# float16: the output is rounded once, 2**-11 at most.
# bfloat16: the interpreter truncates the output where a GPU rounds, 2**-7 at most.
# The gradients are rounded the same way; their scale is in `check_gradients`.
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


def test_reference_rounds_once() -> None:
    """To the dtype of the hidden states, whatever the weight's, as the kernel does."""
    hidden_states, weight = make_inputs(2, 5, 63, torch.bfloat16)
    exact = reference.grouped_rms_norm([h.float() for h in hidden_states], weight.float(), EPS)
    for scale in (weight, weight.float()):
        found = reference.grouped_rms_norm(hidden_states, scale, EPS)
        assert torch.equal(found, exact.bfloat16())


def test_reference_gradients() -> None:
    hidden_states, weight = make_inputs(2, 3, 5, torch.float64)
    inputs = [tensor.clone().requires_grad_() for tensor in (*hidden_states, weight)]
    assert torch.autograd.gradcheck(lambda a, b, w: grouped_rms_norm([a, b], w, EPS), inputs)


# --- the kernel's gradients ---


def check_gradients(
    hidden_states: list[Tensor],
    weight: Tensor,
    device: str,
    wants: list[bool] | None = None,
    out_grad: Tensor | None = None,
) -> list[Tensor | None]:
    """Against float64 autograd of the reference; `wants` names the inputs, the weight last."""
    inputs = [*hidden_states, weight]
    wants = wants or [True] * len(inputs)
    shape = (*weight.shape[:1], *hidden_states[0].shape)
    if out_grad is None:
        generator = torch.Generator().manual_seed(7)
        out_grad = torch.randn(shape, generator=generator).to(hidden_states[0].dtype)
        out_grad = out_grad.movedim(0, -2).flatten(-2)

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    out = reference.grouped_rms_norm(exact[:-1], exact[-1], EPS)
    expected = torch.autograd.grad(out, exact, out_grad.double())
    # A gradient of x is a difference, so its error is measured against what is subtracted from.
    scaled = out_grad.double().unflatten(-1, weight.shape) * weight.double()
    scales = [
        (s / (h.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt()).norm()
        for s, h in zip(scaled.unbind(-2), hidden_states, strict=True)
    ]

    leaves = [
        tensor.to(device).detach().requires_grad_(wanted)
        for tensor, wanted in zip(inputs, wants, strict=True)
    ]
    out = triton_kernel.grouped_rms_norm(leaves[:-1], leaves[-1], EPS)
    out.backward(out_grad.to(device))
    for leaf, exactly, scale, wanted in zip(
        leaves, expected, [*scales, expected[-1].norm()], wants, strict=True
    ):
        if not wanted:
            assert leaf.grad is None
            continue
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        error = (leaf.grad.cpu().double() - exactly).norm()
        assert error <= ERROR_RATIO[leaf.dtype] * scale  # NaN fails too
    return [leaf.grad for leaf in leaves]


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take rows apart that a program would hold whole."""
    monkeypatch.setattr(triton_backward, "MAX_FUSED_SIZE", 32)
    monkeypatch.setattr(triton_backward, "TILE_SIZE", 32)


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 63, 65, 1000])
@pytest.mark.parametrize(("num_groups", "num_rows"), [(1, 9), (2, 1), (3, 4), (4, 6)])
def test_gradients(
    num_groups: int, num_rows: int, hidden_size: int, dtype: torch.dtype, kernel_device: str
) -> None:
    check_gradients(*make_inputs(num_groups, num_rows, hidden_size, dtype), kernel_device)


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("hidden_size", [33, 64, 100])
@pytest.mark.usefixtures("short_tiles")
def test_gradients_of_long_rows(hidden_size: int, dtype: torch.dtype, kernel_device: str) -> None:
    check_gradients(*make_inputs(3, 5, hidden_size, dtype), kernel_device)


def test_gradients_of_many_rows(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than strips of the least height, the last strip not full."""
    monkeypatch.setattr(triton_backward, "MAX_STRIPS", 3)
    assert triton_backward.rows_per_strip(16) == 6
    check_gradients(*make_inputs(2, 16, 20, torch.float32), kernel_device)


@pytest.mark.parametrize("long_rows", [False, True])
@pytest.mark.parametrize("wants", [[1, 1, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 1, 1]])
def test_only_wanted_gradients(
    wants: list[int], long_rows: bool, kernel_device: str, request: pytest.FixtureRequest
) -> None:
    if long_rows:
        request.getfixturevalue("short_tiles")
    inputs = make_inputs(3, 5, 65, torch.float32)
    check_gradients(*inputs, kernel_device, wants=[bool(wanted) for wanted in wants])


def test_zero_gradient(kernel_device: str) -> None:
    hidden_states, weight = make_inputs(2, 5, 63, torch.float32)
    hidden_states[1][2] = 0  # a row of zeros, too
    zeros = torch.zeros(5, 2 * 63)
    for grad in check_gradients(hidden_states, weight, kernel_device, out_grad=zeros):
        assert grad is not None
        assert not grad.any()


def test_gradients_of_no_rows(kernel_device: str) -> None:
    hidden_states, weight = make_inputs(2, 0, 16, torch.float32)
    grads = check_gradients(hidden_states, weight, kernel_device)
    assert [list(grad.shape) for grad in grads if grad is not None] == [[0, 16], [0, 16], [2, 16]]


def test_gradients_of_strided_rows(kernel_device: str) -> None:
    """Leading dimensions, transposed rows, and an upstream gradient with a stride of zero."""
    hidden_states, weight = make_inputs(2, 6, 40, torch.bfloat16)
    hidden_states[1] = hidden_states[1].mT.contiguous().mT
    shaped = [hidden.unflatten(0, (2, 3)) for hidden in hidden_states]
    out_grad = torch.full((), 0.5, dtype=torch.bfloat16).expand(2, 3, 80)
    check_gradients(shaped, weight.float(), kernel_device, out_grad=out_grad)


def test_gradients_are_reproducible(kernel_device: str) -> None:
    inputs = make_inputs(2, 40, 100, torch.float32)
    first, second = (check_gradients(*inputs, kernel_device) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


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
