"""Toy language models, drafts of them and the yardstick of the verification tests."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

History = tuple[int, ...]
Model = Callable[[History], Tensor]  # probabilities [V] of the next token, float64
Draw = Callable[[Tensor, History], int]  # a token after the history, from its weights [V]
Candidates = Callable[[Draw, Tensor, History, int], list[int]]  # that many tokens from q [V]

# Neither 0 nor 1, and exact in float32. The toys' probabilities are what is left after it.
TEMPERATURE = 0.75


def toy_model(vocab_size: int, seed: int, zeros: int = 0, by_depth: bool = False) -> Model:
    """A distribution of its own after each history, `zeros` of its tokens impossible.

    `by_depth` makes it a function of the history's length alone, as SpecFormer's slots are.
    """

    @cache
    def model(history: History) -> Tensor:
        key = (seed, len(history)) if by_depth else (seed, *history)
        generator = torch.Generator().manual_seed(hash(key) % 2**31)
        weights = torch.rand(vocab_size, dtype=torch.float64, generator=generator) ** 2 + 0.01
        weights[torch.randperm(vocab_size, generator=generator)[:zeros]] = 0.0
        return weights / weights.sum()

    return model


def fixed_model(*distributions: Sequence[float]) -> Model:
    """The distribution of each depth, the last one for all that follow."""
    rows = torch.tensor(distributions, dtype=torch.float64)
    return lambda history: rows[min(len(history), len(rows) - 1)]


def sequence_probabilities(model: Model, length: int, history: History = ()) -> Tensor:
    """[V, ..., V]: probability of every sequence of `length` tokens after the history."""
    if length == 0:
        return torch.ones((), dtype=torch.float64)
    p = model(history)
    rest = [sequence_probabilities(model, length - 1, (*history, x)) for x in range(len(p))]
    return torch.stack([p[x] * after for x, after in enumerate(rest)])


def total_variation(found: Tensor, expected: Tensor) -> float:
    return 0.5 * float((found - expected).abs().sum())


def sampling_bound(expected: Tensor, count: int, failure: float = 1e-6) -> float:
    """Total variation that the frequencies of `count` exact draws exceed with this probability.

    A cell's mean deviation is at most its standard deviation; one draw moves the total variation
    by at most 1 / count, so it exceeds its mean by t with probability exp(-2 count t^2) at most
    (McDiarmid).
    """
    mean = 0.5 * float((expected * (1 - expected) / count).sqrt().sum())
    return mean + math.sqrt(math.log(1 / failure) / (2 * count))


def distinct(draw: Draw, q: Tensor, history: History, count: int) -> list[int]:
    """Draws without replacement; placeholders once q is exhausted."""
    left, tokens = q.clone(), []
    for _ in range(count):
        token = draw(left, history) if bool(left.any()) else -1
        tokens.append(token)
        left[token] = 0.0
    return tokens


def independent(draw: Draw, q: Tensor, history: History, count: int) -> list[int]:
    return [draw(q, history) for _ in range(count)]


def most_likely(draw: Draw, q: Tensor, history: History, count: int) -> list[int]:
    return q.topk(count).indices.tolist()


def random_draw(seed: int) -> Draw:
    """Draws from Python's own generator, unrelated to the noise of the verifier."""
    generator = random.Random(seed)

    def draw(weights: Tensor, history: History) -> int:
        values = weights.tolist()
        return generator.choices(range(len(values)), values)[0]

    return draw


class Batch:
    """Rows of several requests, with `widths[d]` drafts below each node of depth d.

    `shared` gives all nodes of a depth the same drafts, as SpecFormer's independent slots do; the
    draft must then be a function of the depth.
    """

    def __init__(
        self,
        target: Model,
        draft: Model,
        widths: Sequence[int],
        candidates: Candidates,
        shared: bool = False,
    ) -> None:
        self.target, self.draft = target, draft
        self.widths, self.candidates, self.shared = widths, candidates, shared
        self.histories: list[History] = []
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.starts = [0]

    def add(self, history: History, draw: Draw) -> None:
        """Draft for one more request, level by level."""
        histories, tokens, parents = [history], [-1], [0]
        level = [0]
        for width in self.widths:
            below: list[int] = []
            drafts: list[int] = []
            for node in level:
                after = histories[node]
                if not (self.shared and drafts):
                    drafts = self.candidates(draw, self.draft(after), after, width)
                below += range(len(tokens), len(tokens) + width)
                tokens += drafts
                parents += [node] * width
                histories += [(*after, token) for token in drafts]
            level = below
        self.histories += histories
        self.tokens += tokens
        self.parents += parents
        self.starts.append(len(self.tokens))

    def arguments(self, one_hot: bool = False, dtype: torch.dtype = torch.float32) -> dict:
        """Arguments of `verify`, but for the rule and the seeds."""
        is_tree = max(self.widths, default=1) > 1
        drafts = {
            "draft_logits": _logits(self.draft, self.histories, dtype),
            "draft_rows": torch.arange(len(self.tokens)),
            "max_children": max(self.widths, default=1),
        }
        return {
            "logits": _logits(self.target, self.histories, dtype),
            "tokens": torch.tensor(self.tokens),
            "row_start_loc": torch.tensor(self.starts, dtype=torch.int32),
            "max_rows": max(1, self.starts[-1] // max(1, len(self.starts) - 1)),
            "parents": torch.tensor(self.parents, dtype=torch.int32) if is_tree else None,
            "temperature": torch.full((len(self.starts) - 1,), TEMPERATURE),
            "positions": torch.tensor([len(after) for after in self.histories]),
        } | ({} if one_hot else drafts)


def _logits(model: Model, histories: list[History], dtype: torch.dtype) -> Tensor:
    return (torch.stack([model(after) for after in histories]).log() * TEMPERATURE).to(dtype)


def generate(
    verify: Callable[..., Any],
    rule: str,
    target: Model,
    draft: Model,
    widths: Sequence[int],
    candidates: Candidates,
    *,
    seeds: Tensor,
    length: int,
    draws: Sequence[Draw] | None = None,
    one_hot: bool = False,
) -> Tensor:
    """[R, length] tokens of as many requests as there are seeds, emitted as an engine would.

    Each step is one batch of the requests that still want tokens. `draws` are each request's own.
    """
    texts: list[History] = [()] * len(seeds)
    draws = draws or [random_draw(0)] * len(seeds)
    while waiting := [r for r, text in enumerate(texts) if len(text) < length]:
        batch = Batch(target, draft, widths, candidates)
        for r in waiting:
            batch.add(texts[r], draws[r])
        result = verify(**batch.arguments(one_hot), rule=rule, seeds=seeds[waiting])
        counts = result.num_tokens.tolist()
        for r, tokens, count in zip(waiting, result.tokens.tolist(), counts, strict=True):
            texts[r] += tuple(tokens[:count])
    return torch.tensor([text[:length] for text in texts])


def moved_to(device: str, verify: Callable[..., Any]) -> Callable[..., Any]:
    """`verify` with its tensors moved to the device."""

    def moved(**arguments: Any) -> Any:
        for name, value in arguments.items():
            arguments[name] = value.to(device) if isinstance(value, Tensor) else value
        return verify(**arguments)

    return moved


def frequencies(texts: Tensor, vocab_size: int) -> Tensor:
    """[V, ..., V]: how often each text [length] came up, as a fraction."""
    length = texts.shape[1]
    cells = (texts * vocab_size ** torch.arange(length - 1, -1, -1)).sum(1)
    counts = torch.bincount(cells, minlength=vocab_size**length)
    return (counts.double() / len(texts)).view([vocab_size] * length)
