"""Candidates: kernel against reference, and both against the ordered draw without replacement."""

from __future__ import annotations

import itertools
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
    sample_candidates,
    triton_kernel,
)
from specformer_kernels.verify import verify
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


# --- Frequencies -----------------------------------------------------------------------------


def probabilities_without_replacement(q: Tensor, count: int) -> dict[tuple[int, ...], float]:
    """Probability of each ordered draw of `count` different tokens."""
    found = {}
    for draw in itertools.permutations(range(len(q)), count):
        probability, left = 1.0, 1.0
        for token in draw:
            probability *= float(q[token]) / left
            left -= float(q[token])
        found[draw] = probability
    return found


def assert_frequencies(draws: Tensor, expected: dict[tuple[int, ...], float]) -> None:
    """Total variation within its expectation plus what chance exceeds once in 10**6.

    The mean of |count / n - p| is at most sqrt(p (1 - p) / n); one draw moves the total variation
    by at most 1 / n, so McDiarmid's inequality bounds the rest.
    """
    rows, counts = draws.unique(dim=0, return_counts=True)
    found = {tuple(row): count for row, count in zip(rows.tolist(), counts.tolist(), strict=True)}
    number = len(draws)
    assert set(found) <= set(expected)
    distance = sum(abs(found.get(draw, 0) / number - p) for draw, p in expected.items()) / 2
    bound = sum(math.sqrt(p * (1 - p) / number) for p in expected.values()) / 2
    assert distance < bound + math.sqrt(math.log(1e6) / (2 * number))


def draw_many(logits: Tensor, number: int, count: int, temperature: float, coupled: bool) -> Tensor:
    """Seeds and positions both vary: [number, count] tokens."""
    noise = {
        "temperature": torch.full((number,), temperature),
        "seeds": torch.arange(number) // 100 + 2**35,
        "positions": torch.arange(number) % 100,
    }
    rows = logits.expand(number, -1)
    return sample_candidates(rows, count, **noise, coupled=coupled).tokens


SMALL = torch.tensor([0.3, 2.0, -1.5, 1.0, -math.inf, 0.9])


@pytest.mark.parametrize("coupled", [False, True], ids=["draft", "target"])
@pytest.mark.parametrize(("count", "temperature"), [(1, 1.0), (2, 0.7), (3, 1.5)])
def test_frequencies(count: int, temperature: float, coupled: bool) -> None:
    q = (SMALL / temperature).softmax(-1)
    expected = probabilities_without_replacement(q[q > 0], count)
    possible = (q > 0).nonzero().flatten().tolist()
    expected = {tuple(possible[i] for i in draw): p for draw, p in expected.items()}
    assert_frequencies(draw_many(SMALL, 40_000, count, temperature, coupled), expected)


def test_a_biased_draw_is_noticed() -> None:
    """Independent draws in place of draws without replacement: the check must fail."""
    q = SMALL[:4].softmax(-1)
    draws = torch.multinomial(q, 80_000, replacement=True, generator=torch.Generator()).view(-1, 2)
    draws = draws[draws[:, 0] != draws[:, 1]]
    with pytest.raises(AssertionError):
        assert_frequencies(draws, probabilities_without_replacement(q, 2))


def test_drafts_are_independent_of_the_target() -> None:
    """The draft's token and the target's, drawn with one seed at one position, are unrelated."""
    number, q = 40_000, SMALL.softmax(-1)
    drafts, targets = (
        draw_many(SMALL, number, 1, 1.0, coupled=coupled)[:, 0] for coupled in (False, True)
    )
    pairs = itertools.product(range(len(q)), repeat=2)
    expected = {(a, b): float(q[a] * q[b]) for a, b in pairs}
    assert_frequencies(torch.stack((drafts, targets), dim=-1), expected)


def write_texts(number: int, is_noise_new_each_step: bool) -> tuple[Tensor, dict]:
    """Two-token texts by block verification of two drafts a step; the target's probabilities.

    Tokens 0 and 1; `target[x]` and `draft[x]` are the logits after token x, row 2 after the prompt.
    """
    target = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]).log()
    draft = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]).log()
    texts = torch.full((number, 1), 2)
    lengths, seeds = torch.ones(number, dtype=torch.int64), torch.arange(number) + 2**40
    texts = torch.cat((texts, torch.full((number, 5), -1)), dim=-1)
    while (lengths < 3).any():
        (left,) = torch.where(lengths < 3)
        root, ones = lengths[left] - 1, torch.ones(len(left))
        path = [texts[left, root]]
        for slot in range(2):
            positions = 64 * root + slot if is_noise_new_each_step else root + slot
            noise = {"temperature": ones, "seeds": seeds[left], "positions": positions}
            path.append(sample_candidates(draft[path[-1]], 1, **noise).tokens[:, 0])
        tokens = torch.stack(path, dim=-1)  # [left, 3]
        row = torch.arange(tokens.numel())
        verified = verify(
            target[tokens.flatten()],
            tokens.flatten(),
            torch.arange(0, len(row) + 1, 3, dtype=torch.int32),
            3,
            rule="block",
            temperature=ones,
            seeds=seeds[left],
            positions=(root[:, None] + torch.arange(3)).flatten(),
            draft_logits=draft[tokens.flatten()],
            draft_rows=row,
        )
        for index in range(3):
            is_token = verified.num_tokens > index
            at = left[is_token]
            texts[at, lengths[at]] = verified.tokens[is_token, index]
            lengths[at] += 1
    p = target.exp()
    pairs = itertools.product(range(2), repeat=2)
    return texts[:, 1:3], {(a, b): float(p[2, a] * p[a, b]) for a, b in pairs}


def test_block_verification_needs_new_noise_each_step() -> None:
    """It looks at drafts that it throws away: drawn again with their noise, they bias the text."""
    assert_frequencies(*write_texts(800, is_noise_new_each_step=True))
    with pytest.raises(AssertionError):
        assert_frequencies(*write_texts(800, is_noise_new_each_step=False))


@pytest.mark.statistics
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_frequencies_over_many_draws(count: int, temperature: float) -> None:
    logits = SMALL[[0, 1, 2, 3, 5]]
    expected = probabilities_without_replacement((logits / temperature).softmax(-1), count)
    assert_frequencies(draw_many(logits, 2_000_000, count, temperature, coupled=False), expected)


@pytest.mark.statistics
def test_frequencies_of_a_served_vocabulary() -> None:
    """First and second token at V = 32,000, binned: eight likely tokens and the rest."""
    vocabulary, likely = 32_000, 8
    logits = torch.cat((torch.linspace(12, 10, likely), torch.zeros(vocabulary - likely)))
    q = logits.double().softmax(-1)
    drawn = []
    for start in range(0, 8_000, 500):
        noise = {
            "temperature": torch.ones(500),
            "seeds": torch.arange(start, start + 500),
            "positions": torch.arange(start, start + 500) * 17,
        }
        rows = logits.expand(500, -1)
        drawn.append(sample_candidates(rows, 2, **noise).tokens.clamp(max=likely))
    rest = float(1 - q[:likely].sum())
    bins = [float(value) for value in q[:likely]] + [rest]
    expected = {
        (a, b): bins[a] * bins[b] / (1 - bins[a])
        for a, b in itertools.product(range(likely), range(likely + 1))
        if a != b
    }
    # After a token of the rest, what it leaves of the rest depends on it by 1e-5 of itself.
    left = 1 - float(q[-1])
    expected |= {(likely, b): rest * bins[b] / left for b in range(likely)}
    expected[(likely, likely)] = rest * (rest - float(q[-1])) / left
    assert math.isclose(sum(expected.values()), 1.0)
    assert_frequencies(torch.cat(drawn), expected)


# --- Arguments -------------------------------------------------------------------------------


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
