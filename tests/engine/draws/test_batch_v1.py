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
def probs() -> Tensor:
    """Distributions of four requests, [4 * SLOTS, V]; a third of the tokens has none."""
    logits = torch.randn(4 * SLOTS, VOCABULARY, generator=Generator().manual_seed(1))
    logits[:, ::3] = float("-inf")
    return logits.softmax(-1)


def drawn(engine: Any, probs: Tensor, at_once: bool = True) -> tuple[list[list[int]], Tensor]:
    """Drafts [R][SLOTS] of a step, -1 where vLLM's own were left, and the distributions.

    All slots at once, or slot by slot as with a Markov term.
    """
    count = len(engine.requests)
    batch, probs = DrawnBatch(engine, count, SLOTS), probs[: count * SLOTS].clone()
    tokens = torch.full((len(probs),), -1)
    if at_once:
        batch.apply(tokens, probs)
        return tokens.view(count, SLOTS).tolist(), probs
    for slot in range(SLOTS):
        chosen, of_slot = tokens[slot::SLOTS].clone(), probs[slot::SLOTS].clone()
        tokens[slot::SLOTS] = batch.apply(chosen, of_slot, slot)
        probs[slot::SLOTS] = of_slot
    return tokens.view(count, SLOTS).tolist(), probs


def test_what_a_batch_asks_for() -> None:
    engine = runner(GREEDY, DRAWS, BEST, seeded(1), seeded(2), discarded=(4,))
    batch = DrawnBatch(engine, 5, SLOTS)
    assert (batch.num_drawn, batch.best) == (3, [2])
    assert batch.streams.keys() == {3}
    assert DrawnBatch(runner(GREEDY, BEST), 2, SLOTS).num_drawn == 0


@pytest.mark.parametrize("at_once", [True, False])
def test_best_tokens_are_certain(probs: Tensor, at_once: bool) -> None:
    """Of these rows alone."""
    tokens, changed = drawn(runner(DRAWS, BEST, GREEDY, BEST), probs, at_once)
    best = probs.argmax(-1).view(4, SLOTS).tolist()
    assert tokens == [[-1] * SLOTS, best[1], [-1] * SLOTS, best[3]]
    certain = torch.nn.functional.one_hot(probs.argmax(-1), VOCABULARY).float()
    rows = torch.tensor([False, True, False, True]).repeat_interleave(SLOTS)
    assert torch.equal(changed, torch.where(rows[:, None], certain, probs))


def test_a_seed_decides_whatever_is_beside_it(probs: Tensor) -> None:
    """Also in another row, and after a step in which its prompt was not yet at its end."""
    alone, other = runner(seeded(7)), runner(seeded(7), GREEDY, discarded=(0,))
    expected = [drawn(alone, probs)[0][0] for _ in range(5)]
    assert len({tuple(tokens) for tokens in expected}) > 1
    assert drawn(other, probs)[0][0] == [-1] * SLOTS
    other.discard_request_mask.np[0] = False
    assert [drawn(other, probs)[0][0] for _ in range(5)] == expected
    assert [drawn(runner(seeded(7)), probs, at_once=False)[0][0]] == expected[:1]
    assert drawn(runner(seeded(8)), probs)[0][0] != expected[0]
    torch.manual_seed(99)
    assert drawn(runner(seeded(7), seeded(8)), probs)[0][0] == expected[0]


def test_the_targets_noise_is_left_alone(probs: Tensor) -> None:
    """Neither used up nor used twice: verification must not know what drew the drafts."""
    engine = runner(seeded(7))
    generator = engine.requests["0"].generator
    before = generator.get_state()
    drawn(engine, probs)
    assert torch.equal(generator.get_state(), before)
    (stream,) = DrawnBatch(engine, 1, SLOTS).streams.values()
    assert stream.initial_seed() != generator.initial_seed()


def test_seeded_draws_have_their_distribution(probs: Tensor) -> None:
    engine, row = runner(seeded(3)), probs[:1]
    steps = [DrawnBatch(engine, 1, 1).apply(torch.tensor([-1]), row.clone()) for _ in range(4000)]
    draws = torch.cat(steps)
    counts = draws.bincount(minlength=VOCABULARY)
    assert counts[row[0] == 0].sum() == 0
    expected = 4000 * row[0]
    likely = expected > 8
    distance = ((counts - expected).square() / expected)[likely].sum()
    freedom = torch.tensor(likely.sum().item() / 2)
    assert torch.special.gammaincc(freedom, distance / 2) > 1e-4
