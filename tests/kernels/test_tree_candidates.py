"""Candidates of a beam: kernel against reference, against plain scores, and what both refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specformer_kernels.noise import Stream, gumbel
from specformer_kernels.tree_candidates import Candidates, reference, triton_kernel
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 3, 63, 65, 1000, 1024, 2500]  # the last two: one full chunk, three chunks of four rows
# Scores are logits below 100 plus noise: the kernel's noise differs by 5e-6 of its value
# (test_noise), up to 22 times a temperature of 2, and sums round to 2**-24 of 100. Two that close
# may change place. A division by a ranking of 0.5 doubles it.
SCORE_ERROR = 5e-4
IMPLEMENTATIONS = [reference.tree_candidates, triton_kernel.tree_candidates]
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["torch", "triton"])


def make(
    requests: int, beam: int, scored: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits and bias, parts of wider tensors, so that strides are not lengths."""
    generator = torch.Generator().manual_seed(scored)
    logits = 3 * torch.randn(requests, scored + 5, generator=generator)
    bias = torch.randn(requests, beam + 1, scored + 3, generator=generator)
    return logits.to(dtype)[:, :-5], bias.to(dtype)[:, 1:, 3:]


def make_noise(temperature: list[float]) -> dict[str, Any]:
    """Sampling arguments with seeds that fill both halves of their word."""
    rows = torch.arange(len(temperature))
    return {
        "temperature": torch.tensor(temperature, dtype=torch.float32),
        "seeds": rows * (2**33 + 7) - 5,
        "positions": rows % 3 + 100_000,
    }


def on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device != "cpu" else value


def run(
    implementation: Callable,
    device: str,
    logits: Tensor,
    bias: Tensor | None,
    *args: Any,
    **more: Any,
) -> Candidates:
    more = {name: on(device, value) for name, value in more.items()}
    found = implementation(on(device, logits), on(device, bias), *args, **more)
    return Candidates(*(tensor.cpu() for tensor in found))


def scores_of(
    logits: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    ranking: float = 1.0,
    drawn_ranking: float | None = None,
    token_ids: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Scores in float64, request by request: [R, w, N]."""
    found = []
    for request, own in enumerate(logits.double()):
        rows = own[None] if bias is None else own + bias[request].double()
        if temperature is not None and seeds is not None and positions is not None:
            heat = float(temperature[request])
            ids = torch.arange(len(own)) if token_ids is None else token_ids
            key = seeds[request], positions[request]
            if heat > 0:
                rows = rows + heat * gumbel(*key, ids, Stream.TARGET, torch.float64)
        is_drawn = temperature is not None and float(temperature[request]) > 0
        found.append(rows / (drawn_ranking if is_drawn and drawn_ranking else ranking))
    return torch.stack(found)


def assert_right(
    found: Candidates, logits: Tensor, bias: Tensor | None, count: int, **more: Any
) -> None:
    """The c largest scores, but where two are too close to tell, and their log-probabilities."""
    scores = scores_of(logits, bias, **more)
    token_ids, chains = more.get("token_ids"), more.get("chains")
    assert found.tokens.shape == found.log_probs.shape == (*scores.shape[:2], count)
    assert found.tokens.dtype == torch.int64
    assert found.log_probs.dtype == torch.float32
    for request, rows in enumerate(scores):
        wanted = 1 if chains is not None and chains[request] else count
        for row, own in enumerate(rows):
            possible = min(wanted, int((own > -math.inf).sum()))
            tokens = found.tokens[request, row]
            assert (tokens[possible:] == -1).all()
            assert (found.log_probs[request, row, possible:] == -math.inf).all()
            places = tokens[:possible]
            if token_ids is not None:
                places = torch.searchsorted(token_ids, places)
                assert torch.equal(token_ids[places], tokens[:possible])
            assert len(set(places.tolist())) == possible
            best = own.sort(descending=True).values[:possible]
            torch.testing.assert_close(own[places], best, rtol=0, atol=SCORE_ERROR)
            log_probs = own.log_softmax(-1)[places]
            torch.testing.assert_close(
                found.log_probs[request, row, :possible].double(),
                log_probs,
                rtol=0,
                atol=2 * SCORE_ERROR,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("scored", SIZES)
def test_largest_scores(scored: int, count: int, dtype: torch.dtype, kernel_device: str) -> None:
    logits, bias = make(4, 4, scored, dtype)
    noise = make_noise([1.0, 0.0, 0.25, 1.7])
    token_ids = torch.arange(scored) * 3 + 7
    for more in (
        {},
        {"ranking": 0.7},
        noise,
        noise | {"ranking": 1.3, "token_ids": token_ids},
        noise | {"ranking": 0.6, "drawn_ranking": 1.3},
        {"ranking": 0.7, "drawn_ranking": 1.3},
        noise | {"chains": torch.tensor([False, True, True, False])},
    ):
        for own in (bias, None):
            for implementation in IMPLEMENTATIONS:
                found = run(implementation, kernel_device, logits, own, count, **more)
                assert_right(found, logits, own, count, **more)


@pytest.mark.parametrize(("beam", "count"), [(1, 16), (3, 5), (8, 16)])
def test_widths_of_beam_and_lists(beam: int, count: int, kernel_device: str) -> None:
    logits, bias = make(2, beam, 3000)
    noise = make_noise([0.8, 0.0])
    for implementation in IMPLEMENTATIONS:
        found = run(implementation, kernel_device, logits, bias, count, **noise)
        assert_right(found, logits, bias, count, **noise)


def test_large_vocabulary(kernel_device: str) -> None:
    logits, bias = make(1, 4, 262_147)
    noise = make_noise([1.0])
    found = run(triton_kernel.tree_candidates, kernel_device, logits, bias, 8, **noise)
    assert_right(found, logits, bias, 8, **noise)


@EACH
def test_no_requests(implementation: Callable, kernel_device: str) -> None:
    logits, bias = make(0, 4, 9)
    found = run(implementation, kernel_device, logits, bias, 3, **make_noise([]))
    assert found.tokens.shape == found.log_probs.shape == (0, 4, 3)


@EACH
def test_ties_go_to_the_lower_place(implementation: Callable, kernel_device: str) -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [4999, 4097, 70]] = 2.0
    logits[1, ::2] = -0.0  # equal to 0.0
    bias = torch.zeros(3, 2, 5000)
    bias[2, 1, 10:20] = 3.0
    found = run(implementation, kernel_device, logits, bias, 4).tokens
    assert found[0].tolist() == [[70, 4097, 4999, 0]] * 2
    assert found[1].tolist() == [[0, 1, 2, 3]] * 2
    assert found[2].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]


@EACH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_with_few_tokens(
    temperature: float, implementation: Callable, kernel_device: str
) -> None:
    """Impossible by the logits, which all rows share, or by one row's bias."""
    logits, bias = torch.full((3, 2500), -math.inf), torch.zeros(3, 2, 2500)
    logits[0, [7, 2400]] = torch.tensor([1.0, -1.0])
    logits[1, 2499] = -1e30
    bias[0, 1, 7] = -math.inf
    noise = make_noise([temperature] * 3)
    tokens, log_probs = run(implementation, kernel_device, logits, bias, 3, **noise)
    assert set(tokens[0, 0, :2].tolist()) == {7, 2400}
    assert tokens[:, 1, 0].tolist() == [2400, 2499, -1]
    assert log_probs[1, :, 0].tolist() == [0.0, 0.0]
    left = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0]] * 2, [[0, 0, 0]] * 2]).bool()
    assert torch.equal(tokens >= 0, left)
    assert torch.equal(log_probs > -math.inf, left)


@EACH
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unusable_rows_are_reported(
    value: float, implementation: Callable, kernel_device: str
) -> None:
    logits, bias = (tensor.clone() for tensor in make(3, 2, 2200))
    logits[1, 2150] = value
    bias[2, 1, 0] = value
    noise = make_noise([0.0, 1.0, 1.0])
    tokens, log_probs = run(implementation, kernel_device, logits, bias, 2, **noise)
    is_good = torch.tensor([[1, 1], [0, 0], [1, 0]]).bool()[..., None].expand(-1, -1, 2)
    assert torch.equal(tokens >= 0, is_good)
    assert torch.equal(log_probs > -math.inf, is_good)
    alone = {name: values[2:] for name, values in noise.items()}
    one = run(implementation, kernel_device, logits[2:], bias[2:, :1], 2, **alone)
    assert torch.equal(one.tokens[0, 0], tokens[2, 0])


@EACH
def test_row_does_not_depend_on_what_is_beside_it(
    implementation: Callable, kernel_device: str
) -> None:
    """Of the batch, the beam, or how many candidates are asked for."""
    logits, bias = make(3, 4, 700)
    noise = make_noise([0.8, 0.0, 1.2])
    found = run(implementation, kernel_device, logits, bias, 5, **noise)
    for request, row, count in ((0, 3, 5), (1, 1, 1), (2, 2, 3)):
        one = {name: value[request : request + 1] for name, value in noise.items()}
        own = bias[request : request + 1, row : row + 1]
        alone = run(implementation, kernel_device, logits[request : request + 1], own, count, **one)
        assert torch.equal(alone.tokens[0, 0], found.tokens[request, row, :count])
        assert torch.equal(alone.log_probs[0, 0], found.log_probs[request, row, :count])


@EACH
@pytest.mark.parametrize("has_token_ids", [False, True])
def test_the_targets_sample_is_a_candidate_exactly_if_its_score_is_large_enough(
    has_token_ids: bool, implementation: Callable, kernel_device: str
) -> None:
    """The target samples argmax(p / T + G); with its own logits that is the first candidate."""
    requests, vocabulary, count = 40, 60, 3
    draft, _ = make(requests, 1, vocabulary)
    temperature = 0.5 + torch.arange(requests) / 40
    noise = make_noise(temperature.tolist())
    scored = torch.arange(0, vocabulary, 2) if has_token_ids else torch.arange(vocabulary)
    target = draft + 3 * torch.randn(draft.shape, generator=torch.Generator().manual_seed(1))
    draws = gumbel(
        noise["seeds"][:, None],
        noise["positions"][:, None],
        torch.arange(vocabulary),
        Stream.TARGET,
    )
    sampled = (target / temperature[:, None] + draws).argmax(-1)
    own = (draft / temperature[:, None] + draws)[:, scored]
    more = {"token_ids": scored} if has_token_ids else {}
    found = run(implementation, kernel_device, draft[:, scored], None, count, **noise, **more)
    expected = scored[own.topk(count).indices] == sampled[:, None]
    assert torch.equal(found.tokens[:, 0] == sampled[:, None], expected)
    share = expected.any(-1).float().mean()
    assert 0.3 < share < 1, "no such case among them"
    same = run(implementation, kernel_device, target[:, scored], None, 1, **noise, **more)
    is_scored = (scored == sampled[:, None]).any(-1)
    assert torch.equal(same.tokens[is_scored, 0, 0], sampled[is_scored])


def test_reference_in_float64() -> None:
    logits, bias = make(3, 2, 200)
    noise = make_noise([0.5, 0.0, 1.0])
    double = reference.tree_candidates(logits.double(), bias, 4, **noise)
    assert double.log_probs.dtype == torch.float64
    single = reference.tree_candidates(logits, bias, 4, **noise)
    assert torch.equal(single.tokens, double.tokens)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    scored=st.integers(1, 2500),
    beam=st.integers(1, 8),
    count=st.integers(1, 16),
    temperatures=st.lists(st.sampled_from([0.0, 0.1, 1.0, 5.0]), min_size=1, max_size=3),
    impossible=st.sampled_from([0.0, 0.5, 0.999]),
    levels=st.sampled_from([2, 1000]),
)
def test_any_rows(
    scored: int,
    beam: int,
    count: int,
    temperatures: list[float],
    impossible: float,
    levels: int,
    kernel_device: str,
) -> None:
    """Masked vocabularies and many equal scores included."""
    generator = torch.Generator().manual_seed(scored)
    requests = len(temperatures)
    logits = torch.randint(levels, (requests, scored), generator=generator) * (4.0 / levels)
    bias = torch.randint(3, (requests, beam, scored), generator=generator) / 2
    logits[torch.rand(logits.shape, generator=generator) < impossible] = -math.inf
    noise = make_noise(temperatures)
    for implementation in IMPLEMENTATIONS:
        found = run(implementation, kernel_device, logits, bias, count, **noise)
        assert_right(found, logits, bias, count, **noise)


@EACH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits", torch.zeros(3)),
        ("logits", torch.zeros(3, 0)),
        ("logits", torch.zeros(3, 8, dtype=torch.int64)),
        ("logits", torch.zeros(8, 3).mT),
        ("bias", torch.zeros(3, 8)),
        ("bias", torch.zeros(3, 9, 8)),
        ("bias", torch.zeros(3, 2, 7)),
        ("bias", torch.zeros(3, 2, 8, dtype=torch.int64)),
        ("bias", torch.zeros(3, 8, 2).mT),
        ("num_candidates", 0),
        ("num_candidates", 17),
        ("ranking", 0.0),
        ("drawn_ranking", -1.0),
        ("ranking", math.nan),
        ("ranking", math.inf),
        ("temperature", torch.ones(2)),
        ("temperature", torch.ones(3, dtype=torch.float64)),
        ("seeds", None),
        ("seeds", torch.zeros(3, dtype=torch.int32)),
        ("positions", None),
        ("positions", torch.zeros(1, dtype=torch.int64).expand(3)),
        ("token_ids", torch.zeros(3, dtype=torch.int64)),
        ("token_ids", torch.zeros(8, dtype=torch.int32)),
        ("chains", torch.zeros(8, dtype=torch.bool)),
        ("chains", torch.zeros(3)),
    ],
)
def test_refuses_arguments(name: str, value: Any, implementation: Callable) -> None:
    arguments = {
        "logits": torch.zeros(3, 8),
        "bias": torch.zeros(3, 2, 8),
        "num_candidates": 2,
        **make_noise([1.0] * 3),
    }
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation(**(arguments | {name: value}))


def test_kernel_refuses_what_it_cannot_hold() -> None:
    for logits, bias in (
        (torch.zeros(1, 8, dtype=torch.float64), None),
        (torch.zeros(1, 8), torch.zeros(1, 2, 8, dtype=torch.float64)),
        (torch.zeros(1, triton_kernel.MAX_SCORED + 1, dtype=torch.float16), None),
    ):
        with pytest.raises(ValueError, match=r"^(logits|bias): "):
            triton_kernel.tree_candidates(logits, bias, 1)
