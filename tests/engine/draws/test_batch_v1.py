"""The rows of a V1 batch: streams of seeded requests, and best tokens that are certain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from vllm import SamplingParams

from vllm_specformer.engine.draws.batch_v1 import DrawnBatch

VOCABULARY, SLOTS = 50, 3
GREEDY = SamplingParams(temperature=0)
DRAWS = SamplingParams(temperature=1)
BEST = SamplingParams(temperature=1, top_k=1)


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1, seed=seed)


def runner(*params: SamplingParams, discarded: tuple[int, ...] = ()) -> Any:
    """What is read of vLLM's runner: its requests, and the rows whose sample is thrown away."""
    requests = {}
    for number, given in enumerate(params):
        generator = None if given.seed is None else Generator().manual_seed(given.seed)
        requests[str(number)] = SimpleNamespace(sampling_params=given, generator=generator)
    mask = torch.zeros(len(params), dtype=torch.bool)
    mask[list(discarded)] = True
    return SimpleNamespace(
        requests=requests,
        input_batch=SimpleNamespace(req_ids=list(requests)),
        discard_request_mask=SimpleNamespace(np=mask.numpy()),
    )


@pytest.fixture
def logits() -> Tensor:
    """Of four requests, [4 * SLOTS, V]; a third of the tokens is never to be drawn."""
    found = torch.randn(4 * SLOTS, VOCABULARY, generator=Generator().manual_seed(1))
    found[:, ::3] = float("-inf")
    return found


def batch_of(engine: Any, slots: int = SLOTS) -> DrawnBatch:
    params = [request.sampling_params for request in engine.requests.values()]
    return DrawnBatch(engine, torch.tensor([float(p.temperature) for p in params]), slots)


def drawn(engine: Any, logits: Tensor, at_once: bool = True) -> tuple[list[list[int]], Tensor]:
    """Drafts [R][SLOTS] of a step, and their distributions [R * SLOTS, V].

    All slots at once, or slot by slot as with a Markov term.
    """
    count = len(engine.requests)
    batch, logits = batch_of(engine), logits[: count * SLOTS]
    before = logits.clone()
    if at_once:
        tokens, probs = batch.draw(logits)
    else:
        of_slots = [batch.draw(logits[slot::SLOTS].contiguous(), slot) for slot in range(SLOTS)]
        tokens, probs = (
            torch.stack(parts, 1).flatten(0, 1) for parts in zip(*of_slots, strict=True)
        )
    assert torch.equal(logits, before)
    return tokens.view(count, SLOTS).tolist(), probs


def test_what_a_batch_asks_for() -> None:
    engine = runner(GREEDY, DRAWS, BEST, seeded(1), seeded(2), discarded=(4,))
    batch = batch_of(engine)
    assert (batch.num_drawn, batch.best) == (3, [2])
    assert batch.streams.keys() == {3}
    assert batch_of(runner(GREEDY, BEST)).num_drawn == 0


@pytest.mark.parametrize("at_once", [True, False])
def test_best_tokens_are_certain(logits: Tensor, at_once: bool) -> None:
    """Of sampled requests; greedy ones get them, too, and the others are drawn."""
    tokens, probs = drawn(runner(DRAWS, BEST, GREEDY, BEST), logits, at_once)
    best = logits.argmax(-1).view(4, SLOTS).tolist()
    assert tokens[1:] == best[1:]
    certain = torch.nn.functional.one_hot(logits.argmax(-1), VOCABULARY).float()
    rows = torch.tensor([False, True, False, True]).repeat_interleave(SLOTS)
    torch.testing.assert_close(probs, torch.where(rows[:, None], certain, logits.softmax(-1)))


def test_each_request_has_its_temperature(logits: Tensor) -> None:
    _, probs = drawn(runner(DRAWS, SamplingParams(temperature=0.5), seeded(1), DRAWS), logits)
    divisor = torch.tensor([1, 0.5, 1, 1]).repeat_interleave(SLOTS)
    torch.testing.assert_close(probs, (logits / divisor[:, None]).softmax(-1))


def test_a_seed_decides_whatever_is_beside_it(logits: Tensor) -> None:
    """Also in another row, and after a step in which its prompt was not yet at its end."""
    alone, other = runner(seeded(7)), runner(seeded(7), GREEDY, discarded=(0,))
    expected = [drawn(alone, logits)[0][0] for _ in range(5)]
    assert len({tuple(tokens) for tokens in expected}) > 1
    drawn(other, logits)
    other.discard_request_mask.np[0] = False
    assert [drawn(other, logits)[0][0] for _ in range(5)] == expected
    assert [drawn(runner(seeded(7)), logits, at_once=False)[0][0]] == expected[:1]
    assert drawn(runner(seeded(8)), logits)[0][0] != expected[0]
    torch.manual_seed(99)
    assert drawn(runner(seeded(7), seeded(8)), logits)[0][0] == expected[0]


def test_the_targets_noise_is_left_alone(logits: Tensor) -> None:
    """Neither used up nor used twice: verification must not know what drew the drafts."""
    engine = runner(seeded(7))
    generator = engine.requests["0"].generator
    before = generator.get_state()
    drawn(engine, logits)
    assert torch.equal(generator.get_state(), before)
    (stream,) = batch_of(engine).streams.values()
    assert stream.initial_seed() != generator.initial_seed()


@pytest.mark.parametrize("params", [seeded(3), DRAWS], ids=["seed", "no seed"])
def test_draws_have_their_distribution(logits: Tensor, params: SamplingParams) -> None:
    torch.manual_seed(0)
    engine, row = runner(params), logits[:1]
    draws = torch.cat([batch_of(engine, 1).draw(row)[0] for _ in range(4000)])
    counts, probs = draws.bincount(minlength=VOCABULARY), row[0].softmax(-1)
    assert counts[probs == 0].sum() == 0
    expected = 4000 * probs
    likely = expected > 8
    distance = ((counts - expected).square() / expected)[likely].sum()
    freedom = torch.tensor(likely.sum().item() / 2)
    assert torch.special.gammaincc(freedom, distance / 2) > 1e-4


@pytest.mark.parametrize(("share", "token"), [(0.0, 1), (1 - 2**-53, VOCABULARY - 2)])
def test_the_ends_of_the_distribution(share: float, token: int) -> None:
    """Tokens without probability, the first and the last, are never drawn."""
    row = torch.zeros(1, VOCABULARY)
    row[0, 0] = row[0, -1] = float("-inf")
    batch = batch_of(runner(DRAWS), 1)
    batch._shares = torch.tensor([[share]], dtype=torch.float64)
    assert batch.draw(row)[0].tolist() == [token]
