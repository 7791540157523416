"""Requests that are no settings of `SamplingParams`: prompt embeddings, beam search (V1 runner)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM
from vllm.sampling_params import BeamSearchParams

from support.engines import drafting, engine, greedy, prompts
from support.outputs import counting
from support.paths import TARGET

pytestmark = pytest.mark.matrix

TEXTS = list(prompts()[:9])


def beams(llm: LLM) -> list[list[list[int]]]:
    asked: Any = [{"prompt": text} for text in TEXTS[:4]]
    outputs = llm.beam_search(asked, BeamSearchParams(beam_width=3, max_tokens=16))
    return [[sequence.tokens for sequence in output.sequences] for output in outputs]


def embedded(llm: LLM) -> list[list[int]]:
    """Two prompts of three as their embeddings, the others as text."""
    table = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).get_input_embeddings()
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    asked: list[Any] = [
        {"prompt_embeds": table(torch.tensor(tokenizer(text).input_ids)).detach()}
        if index % 3
        else text
        for index, text in enumerate(TEXTS)
    ]
    outputs = llm.generate(asked, greedy(24), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_same_with_and_without_speculation() -> None:
    options = {"enable_prompt_embeds": True}
    with engine(None, **options) as llm:
        expected = embedded(llm), beams(llm)
    with engine(drafting(4), **options) as llm:
        with counting(llm) as counted:
            found = embedded(llm)
        assert counted["spec_decode_num_accepted_tokens"] > 20
        assert (found, beams(llm)) == expected
