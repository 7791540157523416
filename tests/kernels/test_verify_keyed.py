"""The rules with the noise they are served with: no draw twice, and texts that follow the key."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from specformer_kernels.noise import Stream, gumbel
from specformer_kernels.verify import reference
from torch import Tensor

from support.verify_toys import (
    TEMPERATURE,
    Candidates,
    Model,
    distinct,
    frequencies,
    generate,
    independent,
    most_likely,
    moved_to,
    random_draw,
    sampling_bound,
    sequence_probabilities,
    total_variation,
    toy_model,
)

TARGET, DRAFT = toy_model(3, seed=1), toy_model(3, seed=2)
SAMPLED = ["rejection", "rejection_with_replacement", "block", "coupled"]


class RecordingNoise(reference.KeyedNoise):
    """Notes the key of every draw."""

    def __init__(self, seed: Tensor, root_position: int, keys: list) -> None:
        super().__init__(seed, root_position)
        self.keys = keys

    def accept(self, probability: float, node: int) -> bool:
        self.keys.append(("accept", self.root_position, node))
        return super().accept(probability, node)

    def sample(self, weights: Tensor, position: int) -> int:
        self.keys.append(("sample", position))
        return super().sample(weights, position)

    def sample_target(self, scores: Tensor, position: int) -> int:
        self.keys.append(("sample_target", position))
        return super().sample_target(scores, position)


WIDTHS = {"block": (1, 1, 1), "coupled": (2, 2)}


@pytest.mark.parametrize("rule", SAMPLED)
@pytest.mark.parametrize("one_hot", [False, True])
def test_no_draw_is_used_twice(rule: str, one_hot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even over steps: a draw that was looked at says something about the tokens so far."""
    keys: list = []
    monkeypatch.setattr(reference, "KeyedNoise", lambda *key: RecordingNoise(*key, keys))
    generate(
        reference.verify,
        rule,
        toy_model(5, seed=20),
        toy_model(5, seed=21),
        WIDTHS.get(rule, (2, 2)),
        distinct,
        seeds=torch.tensor([3]),
        length=40,
        one_hot=one_hot,
    )
    assert len(keys) >= 40
    assert len(set(keys)) == len(keys)


def coupled_text(target: Model, seed: int, length: int) -> list[int]:
    """One token at a time, as without speculation."""
    text: list[int] = []
    for position in range(length):
        logits = (target(tuple(text)).log() * TEMPERATURE).float()
        key = torch.tensor(seed), torch.tensor(position), torch.arange(len(logits))
        text.append(int((logits / TEMPERATURE + gumbel(*key, Stream.TARGET)).argmax()))
    return text


@pytest.mark.parametrize("widths", [(), (1,), (1, 1, 1, 1), (3,), (2, 2), (4, 1, 1)])
@pytest.mark.parametrize("candidates", [most_likely, independent])
@pytest.mark.parametrize("one_hot", [False, True])
def test_coupled_text_is_the_same_with_any_draft(
    widths: Sequence[int], candidates: Candidates, one_hot: bool
) -> None:
    target, seeds = toy_model(5, seed=22), torch.tensor([1, 2**40, -7])
    for draft_seed in (22, 23):
        draft = toy_model(5, seed=draft_seed)
        arguments = ("coupled", target, draft, widths, candidates)
        texts = generate(reference.verify, *arguments, seeds=seeds, length=12, one_hot=one_hot)
        assert texts.tolist() == [coupled_text(target, int(seed), 12) for seed in seeds]


@pytest.mark.parametrize("rule", SAMPLED)
def test_text_does_not_depend_on_the_batch(rule: str) -> None:
    models = toy_model(5, seed=24), toy_model(5, seed=25)
    seeds = torch.tensor([5, 6, 7, 8])

    def texts(chosen: list[int]) -> list[list[int]]:
        return generate(
            reference.verify,
            rule,
            *models,
            WIDTHS.get(rule, (2, 1)),
            distinct,
            seeds=seeds[chosen],
            length=10,
            draws=[random_draw(r) for r in chosen],
        ).tolist()

    together = texts([0, 1, 2, 3])
    assert [texts([r])[0] for r in range(4)] == together
    assert texts([2, 0]) == [together[2], together[0]]


@pytest.mark.parametrize("rule", SAMPLED)
def test_frequencies_of_keyed_noise(rule: str) -> None:
    """A small edition of test_verify_statistics.py."""
    count = 1000
    widths = (1, 1) if rule == "block" else (2, 1)
    arguments = (rule, TARGET, DRAFT, widths, distinct)
    texts = generate(reference.verify, *arguments, seeds=torch.arange(count), length=2)
    expected = sequence_probabilities(TARGET, 2)
    bound = sampling_bound(expected, count)
    assert total_variation(frequencies(texts, 3), expected) < bound


# log(0) = -inf is what a token of no weight is to have.
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")
@pytest.mark.parametrize("rule", SAMPLED)
def test_kernels_write_the_same_texts(rule: str, kernel_device: str) -> None:
    """A few, step by step; the interpreter is too slow to count frequencies with."""
    from specformer_kernels.verify import launch

    models = toy_model(4, seed=26), toy_model(4, seed=27)
    arguments = (rule, *models, (1, 1, 1) if rule == "block" else (2, 1), distinct)
    seeds = torch.arange(6)
    expected = generate(reference.verify, *arguments, seeds=seeds, length=6)
    on_device = moved_to(kernel_device, launch.verify)
    assert torch.equal(generate(on_device, *arguments, seeds=seeds, length=6), expected)
