"""vLLM's `rejection_sample_method: block` does not keep the target's distribution.

That is why a speculative config with it is refused. Should a vLLM come in which this test fails,
the refusal can go. A toy model with a vocabulary of three writes two tokens, verified by vLLM's own
kernels. Block verification looks at tests and drafts beyond what it emits. vLLM keys their noise by
seed and position alone, so the next step meets the same numbers again, conditioned on what they
decided before. The standard rule looks at nothing it does not use; it is the control.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

VOCABULARY, DRAFTS, TEXTS = 3, 2, 1500


class Toy:
    """Target and draft whose next token depends on the last one; row VOCABULARY is the start."""

    def __init__(self, sampled_drafts: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.target = torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator)
        self.draft = torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator)
        self.seeds = torch.randint(0, 2**62, (TEXTS,), generator=generator)
        self.temperature = torch.ones(TEXTS)
        self.sampled_drafts = sampled_drafts

    def exact(self) -> Tensor:
        """Probabilities of all two-token texts."""
        first = self.target[VOCABULARY].softmax(-1)
        return first[:, None] * self.target[:VOCABULARY].softmax(-1)

    def propose(self, requests: Tensor, last: Tensor, position: int) -> Tensor:
        """A chain of drafts [n, DRAFTS], drawn as vLLM's speculators draw theirs."""
        from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

        drafts = []
        for depth in range(DRAFTS):
            logits = self.draft[last]
            if self.sampled_drafts:
                last = gumbel_sample(
                    logits,
                    requests.to(torch.int32),
                    self.temperature,
                    self.seeds,
                    torch.full((len(last),), position + depth),
                    apply_temperature=True,
                    is_drafting=True,
                )
            else:
                last = logits.argmax(-1)
            drafts.append(last)
        return torch.stack(drafts, dim=1)

    def step(
        self, requests: Tensor, last: Tensor, position: int, block: bool
    ) -> tuple[Tensor, Tensor]:
        """One speculative step: tokens [n, DRAFTS + 1] and how many of them were emitted [n]."""
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

        inputs = torch.cat((last[:, None], self.propose(requests, last, position)), dim=1)
        cache = torch.zeros(TEXTS, DRAFTS, VOCABULARY)
        cache[requests] = self.draft[inputs[:, :-1]]
        rows, count = torch.arange(DRAFTS + 1), len(requests)
        tokens, emitted = rejection_sample(
            self.target[inputs].flatten(0, 1).contiguous(),
            cache if self.sampled_drafts else None,
            inputs.flatten().to(torch.int32),
            torch.arange(count + 1, dtype=torch.int32) * len(rows),
            (position + rows).repeat(count),
            requests.to(torch.int32),
            requests.to(torch.int32).repeat_interleave(len(rows)),
            rows.to(torch.int32).repeat(count),
            self.temperature,
            self.seeds,
            DRAFTS,
            use_block_verification=block,
        )
        return tokens, emitted

    def frequencies(self, block: bool) -> Tensor:
        """How often each two-token text is written; after a first step of one token by a second."""
        start = torch.full((TEXTS,), VOCABULARY)
        tokens, emitted = self.step(torch.arange(TEXTS), start, 0, block)
        text = tokens[:, :2].clone()
        short = (emitted == 1).nonzero().flatten()
        text[short, 1] = self.step(short, text[short, 0], 1, block)[0][:, 0]
        counts = torch.zeros(VOCABULARY, VOCABULARY)
        counts.index_put_((text[:, 0], text[:, 1]), torch.ones(TEXTS), accumulate=True)
        return counts / TEXTS


@pytest.mark.parametrize("sampled_drafts", [True, False], ids=["sampled", "greedy"])
def test_only_the_block_rule_is_biased(sampled_drafts: bool) -> None:
    toy = Toy(sampled_drafts)
    exact = toy.exact()
    distance = {
        block: 0.5 * float((toy.frequencies(block) - exact).abs().sum()) for block in (True, False)
    }
    # An unbiased rule's distance exceeds its expectation by so much once in a million times.
    expected = 0.5 * float((exact * (1 - exact) / TEXTS).sqrt().sum())
    assert distance[False] < expected + math.sqrt(math.log(1e6) / (2 * TEXTS))
    assert distance[True] > 2 * expected
    assert distance[True] > 3 * distance[False]
