"""The target's exact distribution of short texts, and Pearson's test against samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from support.dense import DenseReference
from support.outputs import Tokens

TOP_K = 8
# A correct sampler fails with this probability per test; the engine's seed makes it repeatable.
LEVEL = 1e-4
# Fewer expected samples than this in a cell make the chi-square law inexact: cells are pooled.
MIN_EXPECTED = 8

Law = dict[Tokens, float]


def next_token_laws(
    reference: DenseReference,
    prompt: Tokens,
    texts: Sequence[Tokens],
    temperature: float,
    top_p: float = 1.0,
) -> list[dict[int, float]]:
    """The target's top-k distribution after prompt + text for texts of one length.

    With `top_p` the fewest of those tokens that hold this share, as vLLM filters.
    """
    ids = torch.tensor([prompt + text for text in texts])
    with torch.no_grad():
        logits = reference.target.target(ids).logits[:, -1].double() / temperature
    top = logits.topk(TOP_K)
    shares = top.values.softmax(-1)
    kept = shares.cumsum(-1) - shares < top_p
    shares = (shares * kept) / (shares * kept).sum(-1, keepdim=True)
    return [
        {token: p for token, p in zip(tokens.tolist(), row.tolist(), strict=True) if p}
        for tokens, row in zip(top.indices, shares, strict=True)
    ]


def joint_law(
    reference: DenseReference,
    prompt: Tokens,
    depth: int,
    temperature: float,
    top_p: float = 1.0,
) -> Law:
    """Probability of every text of `depth` tokens."""
    law: Law = {(): 1.0}
    for _ in range(depth):
        texts = list(law)
        laws = next_token_laws(reference, prompt, texts, temperature, top_p)
        law = {
            (*text, token): law[text] * p
            for text, after in zip(texts, laws, strict=True)
            for token, p in after.items()
        }
    return law


def p_value(law: Mapping[Tokens, float], counts: Counter[Tokens]) -> float:
    """Probability of a fit as bad as this or worse, by Pearson's test with pooled rare cells."""
    total = sum(counts.values())
    pooled_expected, pooled_count, statistic, cells = 0.0, 0, 0.0, 0
    for text, p in law.items():
        expected = p * total
        if expected < MIN_EXPECTED:
            pooled_expected, pooled_count = pooled_expected + expected, pooled_count + counts[text]
        else:
            statistic, cells = statistic + (counts[text] - expected) ** 2 / expected, cells + 1
    if pooled_expected >= MIN_EXPECTED:
        statistic += (pooled_count - pooled_expected) ** 2 / pooled_expected
        cells += 1
    freedom = torch.tensor((cells - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2).double()))


def assert_law(laws: Mapping[int, Law], samples: Sequence[Tokens]) -> None:
    """Samples have the law of each depth, and no token outside of it."""
    for depth, law in laws.items():
        counts = Counter(s[:depth] for s in samples)
        assert counts.keys() <= law.keys(), "a token outside the target's top k or nucleus"
        assert p_value(law, counts) > LEVEL, f"first {depth} tokens"
