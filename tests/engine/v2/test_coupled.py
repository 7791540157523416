"""Coupled verification: with seeds, the text is the same with speculation on and off."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from specformer_kernels.noise import Stream, gumbel
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from support.engines import Job, drafting, prompts, run_plain
from support.outputs import Tokens, counting, token_ids
from support.paths import HEAD
from support.v2.engines import SMALL, K, engine, runner, speculator
from vllm_specformer.config import read_head_config
from vllm_specformer.engine.coupled import CoupledSampler

MAX_TOKENS = 6
# In the interpreter a hundred take two minutes; `make test-slow` takes them.
TEXTS = prompts()[100 : 100 + int(os.environ.get("SPECFORMER_COUPLED_TEXTS", "30"))]
# Every prompt draws one combination, so that all of them meet in the same batches.
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.8},
    {"top_k": 20},
    {"top_k": 50, "top_p": 0.9},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5},
)
SETTINGS = tuple(itertools.product((0.5, 1.0, 1.5), FILTERS))
WIDE = {"max_num_seqs": 32, "max_num_batched_tokens": 512}


def sampled(texts: Sequence[str]) -> Job:
    """Each prompt with temperature, filters and a seed of its own; every tenth one is greedy."""
    params = []
    for number in range(len(texts)):
        temperature, filters = SETTINGS[number % len(SETTINGS)]
        if number % 10 == 9:
            temperature, filters = 0.0, {}
        params.append(
            SamplingParams(
                temperature=temperature, max_tokens=MAX_TOKENS, seed=1000 + number, **filters
            )
        )
    return Job(texts, params)


@pytest.fixture(scope="module")
def plain() -> list[list[Tokens]]:
    """The texts without speculation."""
    return token_ids(run_plain({"all": sampled(TEXTS)}, **(SMALL | WIDE))["all"])


def test_prompts_are_many_and_texts_random(plain: list[list[Tokens]]) -> None:
    assert len(set(TEXTS)) == len(TEXTS) >= 2 * len(SETTINGS)
    assert len({tuple(text) for text in plain}) >= 0.9 * len(TEXTS)


@pytest.mark.parametrize(
    ("num_tokens", "draft_sample_method", "num_prompts"),
    [
        (K, None, len(TEXTS)),  # the default: drawn with the target's noise
        (1, "greedy", 20),
        (K, "greedy", 24),
        (None, "probabilistic", 20),
    ],
)
def test_text_does_not_depend_on_speculation(
    num_tokens: int | None,
    draft_sample_method: str | None,
    num_prompts: int,
    plain: list[list[Tokens]],
) -> None:
    method = {"draft_sample_method": draft_sample_method} if draft_sample_method else {}
    speculative = drafting(num_tokens, verification="coupled", **method)
    texts = TEXTS[:num_prompts]
    with engine(speculative, **WIDE) as llm, counting(llm) as counted:
        assert type(runner(llm).rejection_sampler) is CoupledSampler
        assert speculator(llm).draws_with_target is (draft_sample_method != "greedy")
        found = token_ids(sampled(texts).run(llm))
    wrong = [index for index, text in enumerate(found) if text != plain[index]]
    print(f"{num_tokens} {draft_sample_method}: tokens per step {counted.tokens_per_step:.2f}")
    assert wrong == []
    # Drafts were accepted, and drafts were rejected.
    drafted = counted["spec_decode_num_draft_tokens"]
    assert 0.05 * drafted < counted["spec_decode_num_accepted_tokens"] < 0.95 * drafted
    assert num_tokens or read_head_config(HEAD).num_draft_slots > K


def test_vllms_own_rule_changes_the_text(plain: list[list[Tokens]]) -> None:
    """The control: without coupling the same seeds give other texts, so the test above can fail."""
    with engine(drafting(K), **WIDE) as llm:
        assert type(runner(llm).rejection_sampler) is not CoupledSampler
        found = token_ids(sampled(TEXTS[:16]).run(llm))
    same = [text == plain[index] for index, text in enumerate(found)]
    assert not all(same)


def test_our_noise_is_vllms() -> None:
    """So that `verify(rule="coupled")` of the kernel library agrees with vLLM's sampler too."""
    generator = torch.Generator().manual_seed(3)
    rows, vocabulary = 40, 3000
    logits = torch.randn(rows, vocabulary, generator=generator)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    positions = torch.randint(0, 2**20, (rows,), generator=generator)
    temperature = torch.full((rows,), 0.7)
    index = torch.arange(rows, dtype=torch.int32)
    theirs = gumbel_sample(
        logits, index, temperature, seeds, positions, apply_temperature=True, is_drafting=False
    )
    drawn = gumbel(seeds[:, None], positions[:, None], torch.arange(vocabulary), Stream.TARGET)
    assert torch.equal(theirs, (logits / 0.7 + drawn).argmax(-1))
