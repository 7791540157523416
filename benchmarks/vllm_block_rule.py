"""Shows that vLLM's `rejection_sample_method: block` does not keep the target's distribution.

    PYTHONPATH=tests python benchmarks/vllm_block_rule.py [--texts 1500]

A toy model with a vocabulary of three writes two tokens, verified by vLLM's own kernels (through
Triton's interpreter; minutes). Block verification looks at tests and drafts beyond what it emits.
vLLM keys their noise by seed and position alone, so the next step meets the same numbers again,
conditioned on what they decided before. The standard rule looks at nothing it does not use; it is
the control.
"""

# The interpreter must be in place before vLLM is imported.
# ruff: noqa: E402

from __future__ import annotations

import argparse
import math
import os

os.environ.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")

from support.v2 import interpreter, triton_cpu

triton_cpu.install()
interpreter.keep_booleans()
interpreter.provide_log1p()
interpreter.patch_language_once()

import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

VOCABULARY, DRAFTS = 3, 2


class Toy:
    """Target and draft whose next token depends on the last one; row VOCABULARY is the start."""

    def __init__(self, texts: int, sampled_drafts: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.target = torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator)
        self.draft = torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator)
        self.seeds = torch.randint(0, 2**62, (texts,), generator=generator)
        self.temperature = torch.ones(texts)
        self.sampled_drafts = sampled_drafts

    def exact(self) -> Tensor:
        """Probabilities of all two-token texts."""
        first = self.target[VOCABULARY].softmax(-1)
        return first[:, None] * self.target[:VOCABULARY].softmax(-1)

    def propose(self, requests: Tensor, last: Tensor, position: int) -> Tensor:
        """A chain of drafts [n, DRAFTS], drawn as vLLM's speculators draw theirs."""
        drafts = []
        for depth in range(DRAFTS):
            logits = self.draft[last]
            if self.sampled_drafts:
                where = torch.full((len(last),), position + depth)
                last = gumbel_sample(
                    logits,
                    requests.to(torch.int32),
                    self.temperature,
                    self.seeds,
                    where,
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
        drafts = self.propose(requests, last, position)
        inputs = torch.cat((last[:, None], drafts), dim=1)
        cache = torch.zeros(len(self.seeds), DRAFTS, VOCABULARY)
        cache[requests] = self.draft[inputs[:, :-1]]
        rows, count = torch.arange(DRAFTS + 1), len(requests)
        return rejection_sample(
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


def frequencies(toy: Toy, block: bool) -> Tensor:
    """How often each two-token text was written; a first step of one token is followed by one."""
    texts = len(toy.seeds)
    tokens, emitted = toy.step(
        torch.arange(texts), torch.full((texts,), VOCABULARY), 0, block=block
    )
    text = tokens[:, :2].clone()
    short = (emitted == 1).nonzero().flatten()
    text[short, 1] = toy.step(short, text[short, 0], 1, block=block)[0][:, 0]
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    counts.index_put_((text[:, 0], text[:, 1]), torch.ones(texts), accumulate=True)
    return counts / texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1500)
    texts = parser.parse_args().texts
    print(
        f"{'rule':10}{'drafts':10}{'total variation':>17}{'sampling error':>16}{'1e-6 bound':>12}"
    )
    for sampled_drafts in (True, False):
        for block in (True, False):
            toy = Toy(texts, sampled_drafts)
            exact = toy.exact()
            distance = 0.5 * float((frequencies(toy, block) - exact).abs().sum())
            expected = 0.5 * float((exact * (1 - exact) / texts).sqrt().sum())
            bound = expected + math.sqrt(math.log(1e6) / (2 * texts))
            rule = "block" if block else "standard"
            drafts = "sampled" if sampled_drafts else "greedy"
            print(f"{rule:10}{drafts:10}{distance:17.3f}{expected:16.3f}{bound:12.3f}", flush=True)


if __name__ == "__main__":
    main()
