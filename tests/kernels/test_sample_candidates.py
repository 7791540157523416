"""Candidates: kernel against reference, and what both refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specformer_kernels.noise import Stream, gumbel
from specformer_kernels.sample_candidates import (
    Candidates,
    reference,
    triton_kernel,
)
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 3, 63, 65, 1000, 4096, 9001]  # the last two: one full chunk, three chunks
# Keys are logits below 100 after temperature, plus noise: the kernel's noise differs by 5e-6 of its
# value (test_noise), up to 22, and sums round to 2**-24 of 100. Values that close may change place.
KEY_ERROR = 1.5e-4
# Quotient, difference and logarithm round to 2**-24 of values up to 100 in float32.
LOG_PROB_ERROR = 2e-5
IMPLEMENTATIONS = [reference.sample_candidates, triton_kernel.sample_candidates]
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["torch", "triton"])


def make_noise(num_rows: int, temperature: float | list[float] = 1.0) -> dict[str, Any]:
    """Sampling arguments with seeds that fill both halves of their word."""
    values = temperature if isinstance(temperature, list) else [temperature] * num_rows
    return {
        "temperature": torch.tensor(values, dtype=torch.float32),
        "seeds": torch.arange(num_rows) * (2**33 + 7) - 5,
        "positions": torch.arange(num_rows) % 3 + 100_000,
    }


def make_logits(num_rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a wider tensor, so that a row's stride is not its length."""
    generator = torch.Generator().manual_seed(vocabulary)
    return (3 * torch.randn(num_rows, vocabulary + 5, generator=generator)).to(dtype)[:, :-5]


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def run_kernel(device: str, logits: Tensor, num_candidates: int, **noise: Any) -> Candidates:
    moved = logits.to(device) if device != "cpu" else logits
    found = triton_kernel.sample_candidates(moved, num_candidates, **on(device, noise))
    return Candidates(*(tensor.cpu() for tensor in found))


def in_float64(
    tokens: Tensor,
    logits: Tensor,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    coupled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The keys that tokens were drawn by (0 at -1) and their log-probabilities, [N, c] each."""
    scaled, index = logits.double(), tokens.clamp(min=0)
    noise = torch.zeros(1)
    if temperature is not None and seeds is not None and positions is not None:
        scaled = scaled / torch.where(temperature > 0, temperature, 1.0)[:, None]
        stream = Stream.TARGET if coupled else Stream.DRAFT
        noise = gumbel(seeds[:, None], positions[:, None], index, stream, torch.float64)
        noise = noise * (temperature > 0)[:, None]
    keys = (scaled.gather(-1, index) + noise).masked_fill(tokens < 0, 0.0)
    log_probs = scaled.log_softmax(-1).gather(-1, index)
    return keys, log_probs.masked_fill(tokens < 0, -math.inf)


def assert_agree(found: Candidates, logits: Tensor, num_candidates: int, **noise: Any) -> None:
    """The reference's tokens, but where keys are too close to tell; their log-probabilities."""
    expected = reference.sample_candidates(logits, num_candidates, **noise)
    if "temperature" not in noise:
        assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.tokens < 0, expected.tokens < 0)
    for row in found.tokens.tolist():
        assert len({token for token in row if token >= 0}) == sum(token >= 0 for token in row)
    keys, log_probs = in_float64(found.tokens, logits, **noise)
    expected_keys, _ = in_float64(expected.tokens, logits, **noise)
    torch.testing.assert_close(keys, expected_keys, rtol=0, atol=KEY_ERROR)
    assert found.tokens.dtype == torch.int64
    assert found.log_probs.dtype == torch.float32
    torch.testing.assert_close(found.log_probs.double(), log_probs, rtol=0, atol=LOG_PROB_ERROR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_candidates", [1, 16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_kernel_matches_reference(
    vocabulary: int, num_candidates: int, dtype: torch.dtype, kernel_device: str
) -> None:
    logits = make_logits(4, vocabulary, dtype)
    noise = make_noise(4, [1.0, 0.0, 0.25, 1.7])
    for coupled in (False, True):
        found = run_kernel(kernel_device, logits, num_candidates, **noise, coupled=coupled)
        assert_agree(found, logits, num_candidates, **noise, coupled=coupled)
    assert_agree(run_kernel(kernel_device, logits, num_candidates), logits, num_candidates)


def test_large_vocabulary(kernel_device: str) -> None:
    logits, noise = make_logits(2, 262_147), make_noise(2)
    assert_agree(run_kernel(kernel_device, logits, 16, **noise), logits, 16, **noise)


def test_no_rows(kernel_device: str) -> None:
    for found in (
        run_kernel(kernel_device, torch.empty(0, 9), 3, **make_noise(0)),
        reference.sample_candidates(torch.empty(0, 9), 3, **make_noise(0)),
    ):
        assert found.tokens.shape == found.log_probs.shape == (0, 3)


@EACH
def test_ties_go_to_the_lower_token(implementation: Callable, kernel_device: str) -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [4999, 4097, 70]] = 2.0
    logits[1, ::2] = -0.0  # equal to 0.0
    logits[2, 10:20] = -3.0
    found = implementation(logits.to(kernel_device), 4).tokens.tolist()
    assert found == [[70, 4097, 4999, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    found = implementation((-logits).to(kernel_device), 4).tokens.tolist()
    assert found == [[0, 1, 2, 3], [0, 1, 2, 3], [10, 11, 12, 13]]


@EACH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_with_few_tokens(
    temperature: float, implementation: Callable, kernel_device: str
) -> None:
    logits = torch.full((3, 4500), -math.inf)
    logits[0, [7, 4400]] = torch.tensor([1.0, -1.0])
    logits[1, 4499] = -1e30
    noise = on(kernel_device, make_noise(3, temperature))
    tokens, log_probs = implementation(logits.to(kernel_device), 3, **noise)
    tokens, log_probs = tokens.cpu(), log_probs.cpu()
    assert set(tokens[0, :2].tolist()) == {7, 4400}
    assert tokens[1, 0] == 4499
    assert log_probs[1, 0] == 0.0
    is_left = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    assert torch.equal(tokens >= 0, is_left)
    assert torch.equal(log_probs > -math.inf, is_left)
    assert not log_probs.isnan().any()


@EACH
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unusable_rows_are_reported(
    value: float, implementation: Callable, kernel_device: str
) -> None:
    logits = make_logits(4, 4200).clone()
    logits[1, 4150] = logits[2, 0] = value
    noise = make_noise(4, [1.0, 1.0, 0.0, 0.0])
    tokens, log_probs = implementation(logits.to(kernel_device), 2, **on(kernel_device, noise))
    assert (tokens[1:3] == -1).all()
    assert (log_probs[1:3] == -math.inf).all()
    assert (tokens[[0, 3]] >= 0).all()
    # The rows beside them are not touched.
    alone = implementation(
        logits[:1].to(kernel_device), 2, **on(kernel_device, {k: v[:1] for k, v in noise.items()})
    )
    assert torch.equal(alone.tokens, tokens[:1])


@EACH
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, interpreting
def test_tiny_temperature(implementation: Callable, kernel_device: str) -> None:
    """1e-6 leaves nothing to chance; at 1e-39 the quotient overflows, which is reported."""
    logits = make_logits(4, 300)
    noise = on(kernel_device, make_noise(4, [1e-6, 1e-6, 1e-6, 1e-39]))
    tokens, log_probs = implementation(logits.to(kernel_device), 3, **noise)
    assert torch.equal(tokens[:3].cpu(), logits[:3].argsort(descending=True)[:, :3])
    assert (log_probs[:3, 0] == 0.0).all()
    assert (tokens[3] == -1).all()


@EACH
def test_row_does_not_depend_on_the_batch_or_on_the_number_of_candidates(
    implementation: Callable, kernel_device: str
) -> None:
    logits, noise = make_logits(3, 700).to(kernel_device), on(kernel_device, make_noise(3, 0.8))
    found = implementation(logits, 5, **noise)
    for row, count in ((0, 5), (1, 1), (2, 3)):
        one = {name: value[row : row + 1] for name, value in noise.items()}
        alone = implementation(logits[row : row + 1], count, **one)
        assert torch.equal(alone.tokens[0], found.tokens[row, :count])
        assert torch.equal(alone.log_probs[0], found.log_probs[row, :count])


@EACH
def test_coupled_draft_of_the_target_is_the_targets_token(
    implementation: Callable, kernel_device: str
) -> None:
    logits, noise = make_logits(6, 500), make_noise(6, 0.7)
    draws = gumbel(
        noise["seeds"][:, None], noise["positions"][:, None], torch.arange(500), Stream.TARGET
    )
    expected = (logits / 0.7 + draws).argmax(-1)
    logits, noise = logits.to(kernel_device), on(kernel_device, noise)
    coupled = implementation(logits, 1, **noise, coupled=True).tokens[:, 0]
    assert torch.equal(coupled.cpu(), expected)
    assert not torch.equal(implementation(logits, 1, **noise).tokens[:, 0].cpu(), expected)


def test_reference_in_float64() -> None:
    logits, noise = make_logits(3, 200), make_noise(3, [0.5, 0.0, 1.0])
    single = reference.sample_candidates(logits, 4, **noise)
    double = reference.sample_candidates(logits.double(), 4, **noise)
    assert torch.equal(single.tokens, double.tokens)
    assert double.log_probs.dtype == torch.float64
    torch.testing.assert_close(
        single.log_probs.double(), double.log_probs, rtol=0, atol=LOG_PROB_ERROR
    )


def test_rows_past_int32_elements(kernel_device: str) -> None:
    """Row * stride passes 2**31. Pages that nothing touches take no memory."""
    if kernel_device == "cuda":
        pytest.skip("a GPU backs every page: the interpreter's addresses stand for both")
    stride, num_rows = 2**30 + 16, 4
    # Not torch.empty, whose poison would touch every page.
    storage = torch.UntypedStorage(((num_rows - 1) * stride + 64) * 2)
    memory = torch.tensor([], dtype=torch.float16).set_(storage)
    logits = memory.as_strided((num_rows, 64), (stride, 1))
    logits.copy_(make_logits(num_rows, 64))
    found = triton_kernel.sample_candidates(logits, 3)
    assert_agree(found, logits, 3)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    vocabulary=st.integers(1, 5000),
    num_candidates=st.integers(1, 16),
    temperatures=st.lists(st.sampled_from([0.0, 0.1, 1.0, 5.0]), min_size=1, max_size=3),
    impossible=st.sampled_from([0.0, 0.5, 0.999]),
    levels=st.sampled_from([2, 1000]),
)
def test_any_row(
    vocabulary: int,
    num_candidates: int,
    temperatures: list[float],
    impossible: float,
    levels: int,
    kernel_device: str,
) -> None:
    """Masked vocabularies and many equal logits included."""
    generator = torch.Generator().manual_seed(vocabulary)
    shape = (len(temperatures), vocabulary)
    logits = torch.randint(levels, shape, generator=generator) * (4.0 / levels)
    logits[torch.rand(shape, generator=generator) < impossible] = -math.inf
    noise = make_noise(len(temperatures), temperatures)
    found = run_kernel(kernel_device, logits, num_candidates, **noise)
    assert_agree(found, logits, num_candidates, **noise)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits", torch.zeros(3)),
        ("logits", torch.zeros(3, 0)),
        ("logits", torch.zeros(3, 8, dtype=torch.int64)),
        ("logits", torch.zeros(8, 3).mT),
        ("num_candidates", 0),
        ("num_candidates", 17),
        ("temperature", torch.ones(2)),
        ("temperature", torch.ones(3, dtype=torch.float64)),
        ("seeds", None),
        ("seeds", torch.zeros(3, dtype=torch.int32)),
        ("positions", None),
        ("positions", torch.zeros(1, dtype=torch.int64).expand(3)),
    ],
)
def test_refuses_arguments(name: str, value: Any, implementation: Callable) -> None:
    arguments = {"logits": torch.zeros(3, 8), "num_candidates": 2, **make_noise(3)} | {name: value}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation(**arguments)


def test_kernel_refuses_what_it_cannot_hold() -> None:
    for logits in (
        torch.zeros(1, 8, dtype=torch.float64),
        torch.zeros(1, triton_kernel.MAX_VOCABULARY + 1, dtype=torch.float16),
    ):
        with pytest.raises(ValueError, match=r"^logits: "):
            triton_kernel.sample_candidates(logits, 1)
