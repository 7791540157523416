"""The Markov term of a slot's logits: kernel against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specformer_kernels.markov_bias import markov_bias, reference, triton_kernel
from torch import Tensor

# Largest RMS error over RMS of the result in float64: the gated entry and the result are rounded to
# the dtype, which the interpreter truncates for bfloat16; sums of a rank are float32.
ERROR_RATIO = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}
TOKENS = 40


def make_inputs(
    rows: int, scored: int, rank: int, dtype: torch.dtype = torch.float32, slots: int = 3
) -> dict[str, Any]:
    """Arguments of the second of some slots, whose logits and gates lie among the others'."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "logits": normal(rows, slots, scored)[:, 1],
        "previous": torch.randint(TOKENS, (rows,), generator=generator),
        "embed": normal(TOKENS, rank),
        "lm_head": normal(scored, rank),
        "gates": normal(rows, slots, rank)[:, 1],
    }


def changed(inputs: dict[str, Any], change: Any) -> dict[str, Any]:
    return {name: None if given is None else change(given) for name, given in inputs.items()}


def in_float64(inputs: dict[str, Any]) -> Tensor:
    wide = changed(inputs, lambda given: given.double() if given.is_floating_point() else given)
    embed = wide["embed"][wide["previous"]]
    earlier = embed if wide["gates"] is None else embed * wide["gates"]
    expected = wide["logits"] + earlier @ wide["lm_head"].T
    torch.testing.assert_close(reference.markov_bias(**wide), expected)
    return expected


def assert_close(found: Tensor, inputs: dict[str, Any]) -> None:
    expected, logits = in_float64(inputs), inputs["logits"]
    assert found.shape == logits.shape
    assert found.dtype == logits.dtype
    assert found.is_contiguous()
    error = (found.cpu().double() - expected).norm()
    assert error <= ERROR_RATIO[logits.dtype] * expected.norm()  # NaN fails too


@pytest.mark.parametrize("is_gated", [True, False], ids=["gates", "no gates"])
@pytest.mark.parametrize("rank", [1, 4, 16, 64, 80])
@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
def test_matches_reference(
    dtype: torch.dtype, rows: int, rank: int, is_gated: bool, kernel_device: str
) -> None:
    inputs = make_inputs(rows, 300, rank, dtype)
    if not is_gated:
        inputs["gates"] = None
    found = triton_kernel.markov_bias(**changed(inputs, lambda given: given.to(kernel_device)))
    assert_close(found, inputs)


@pytest.mark.parametrize("scored", [1, 63, 128, 1000])
@pytest.mark.parametrize("rows", [2, 130])
def test_any_number_of_tokens(rows: int, scored: int, kernel_device: str) -> None:
    """Of tokens that are scored, and of rows in several tiles."""
    inputs = make_inputs(rows, scored, 8, torch.bfloat16)
    found = triton_kernel.markov_bias(**changed(inputs, lambda given: given.to(kernel_device)))
    assert_close(found, inputs)


def test_wide_logits_keep_their_dtype(kernel_device: str) -> None:
    inputs = make_inputs(3, 70, 8, torch.bfloat16)
    inputs["logits"] = inputs["logits"].float()
    found = triton_kernel.markov_bias(**changed(inputs, lambda given: given.to(kernel_device)))
    expected = in_float64(inputs)
    # The logits are not rounded: the gated entry alone is.
    assert (found.cpu().double() - expected).norm() <= ERROR_RATIO[torch.bfloat16] * expected.norm()
    for implementation in (reference.markov_bias, markov_bias):
        assert implementation(**inputs).dtype == torch.float32
    assert found.dtype == torch.float32


def test_any_leading_dimensions(kernel_device: str) -> None:
    inputs = make_inputs(6, 70, 8)
    nested = changed(inputs, lambda given: given.to(kernel_device))
    for name in ("logits", "previous", "gates"):
        nested[name] = nested[name].unflatten(0, (2, 3))
    assert_close(triton_kernel.markov_bias(**nested).flatten(0, 1), inputs)
    alone = changed(make_inputs(1, 70, 8), lambda given: given.to(kernel_device))
    one = {name: alone[name][0] for name in ("logits", "previous", "gates")}
    assert torch.equal(
        triton_kernel.markov_bias(**alone | one), triton_kernel.markov_bias(**alone)[0]
    )


def test_strided_tokens(kernel_device: str) -> None:
    inputs = make_inputs(5, 70, 8)
    inputs["previous"] = torch.stack([inputs["previous"], torch.full((5,), -9)], dim=1)[:, 0]
    found = triton_kernel.markov_bias(**changed(inputs, lambda given: given.to(kernel_device)))
    assert_close(found, inputs)


def test_tokens_of_the_v1_runner(kernel_device: str) -> None:
    """It keeps the tokens that it has sampled as int32."""
    inputs = changed(make_inputs(5, 70, 8), lambda given: given.to(kernel_device))
    found = triton_kernel.markov_bias(**inputs | {"previous": inputs["previous"].int()})
    assert torch.equal(found, triton_kernel.markov_bias(**inputs))


def test_rows_without_a_token_read_nothing(kernel_device: str) -> None:
    """As rows of a CUDA graph that no request is in may hold anything."""
    inputs = changed(make_inputs(4, 70, 8), lambda given: given.to(kernel_device))
    whole = inputs["embed"].new_full((TOKENS + 2, 8), float("nan"))
    whole[1:-1] = inputs["embed"]
    inputs["embed"] = whole[1:-1]
    inputs["previous"][1], inputs["previous"][2] = -1, TOKENS
    found = triton_kernel.markov_bias(**inputs)
    assert torch.equal(found[1:3], inputs["logits"][1:3])
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6), (3, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, int], kernel_device: str) -> None:
    rows, scored = shape
    inputs = changed(make_inputs(rows, scored, 4), lambda given: given.to(kernel_device))
    assert triton_kernel.markov_bias(**inputs).shape == shape


def test_a_row_does_not_depend_on_its_neighbours(kernel_device: str) -> None:
    inputs = changed(make_inputs(16, 70, 8), lambda given: given.to(kernel_device))
    together = triton_kernel.markov_bias(**inputs)
    for name in ("logits", "previous", "gates"):
        inputs[name] = inputs[name][5:6]
    assert torch.equal(triton_kernel.markov_bias(**inputs), together[5:6])


def test_on_a_cpu_it_is_the_formula() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(3, 70, 8, dtype)
        logits, previous, embed, lm_head, gates = inputs.values()
        term = (embed[previous] * gates) @ lm_head.T
        assert torch.equal(markov_bias(**inputs), logits + term)


def test_gradients_pass() -> None:
    inputs = make_inputs(2, 5, 3, torch.float64)
    given = {name: inputs[name] for name in ("logits", "embed", "lm_head", "gates")}
    leaves = [tensor.clone().requires_grad_() for tensor in given.values()]

    def call(*values: Tensor) -> Tensor:
        logits, *tables = values
        return markov_bias(logits, inputs["previous"], *tables)

    assert torch.autograd.gradcheck(call, leaves)


BAD = {
    "logits": [torch.zeros(3, 5, dtype=torch.int64), torch.tensor(1.0), torch.zeros(5, 3).T],
    "previous": [torch.zeros(3, dtype=torch.int16), torch.zeros(2, dtype=torch.int64)],
    "embed": [torch.zeros(9), torch.zeros(0, 4), torch.zeros(4, 9).T, torch.ones(9, 4).int()],
    "lm_head": [torch.zeros(5, 3), torch.zeros(5, 4).half(), torch.zeros(4, 5).T],
    "gates": [torch.zeros(3, 5), torch.zeros(3, 4).double(), torch.zeros(4, 3).T],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
@pytest.mark.parametrize("implementation", [reference, triton_kernel], ids=["torch", "triton"])
def test_bad_arguments_are_named(implementation: Any, name: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation.markov_bias(**make_inputs(3, 5, 4) | {name: value})


def test_the_kernel_refuses_float64() -> None:
    wide = make_inputs(3, 5, 4, torch.float64)
    with pytest.raises(ValueError, match=r"logits: .*float64"):
        triton_kernel.markov_bias(**wide)
    with pytest.raises(ValueError, match=r"embed: .*float64"):
        triton_kernel.markov_bias(**wide | {"logits": wide["logits"].float()})
