"""Synthetic acceptance, the same on both runners: drafts are kept as asked, whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm import LLM, SamplingParams

from support.engines import drafting

K = 4
# Chances that the first one, two, three, all drafts are kept.
RATES = [1.0, 1.0, 0.5, 0.0]
SPECULATIVE = drafting(K, rejection_sample_method="synthetic", synthetic_acceptance_rates=RATES)


def kept_per_position(llm: LLM, texts: Sequence[str], max_tokens: int) -> tuple[int, list[int]]:
    """Drafts made, and how often each of their places was kept; half the requests are sampled."""
    params = [
        SamplingParams(temperature=number % 2, seed=number, max_tokens=max_tokens, ignore_eos=True)
        for number in range(len(texts))
    ]
    llm.generate(list(texts), params, use_tqdm=False)
    found: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
    prefix = "vllm:spec_decode_num_"
    drafts = found[f"{prefix}drafts"].value
    return drafts, found[f"{prefix}accepted_tokens_per_pos"].values


def assert_as_asked(drafts: int, kept: list[int]) -> None:
    print(f"{drafts} drafts, kept {kept}")
    assert kept[:2] == [drafts, drafts]
    assert kept[3] == 0
    assert drafts >= 30
    assert 0.2 * drafts < kept[2] < 0.8 * drafts
