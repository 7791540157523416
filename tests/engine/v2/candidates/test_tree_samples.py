"""Sampled requests with trees: the texts of the seeds, and without seeds the target's law."""

from __future__ import annotations

import itertools
from typing import Any

from vllm import SamplingParams

from support.dense import DenseReference
from support.engines import drafting, prompts, tokenizer
from support.laws import TOP_K, assert_law, joint_law
from support.outputs import counting, token_ids
from support.v2.engines import engine

TEXTS = prompts()[100:200]
MAX_TOKENS = 10
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.8},
    {"top_k": 20},
    {"top_k": 50, "top_p": 0.9},
)
SETTINGS = tuple(itertools.product((0.5, 1.0, 1.5), FILTERS))
WIDE = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 256 << 20}
SLOTS, NODES = 8, 16
SAMPLES, DEPTH = 320, 2  # the second token is the first that a tree decides


def test_a_hundred_seeded_texts() -> None:
    params = [
        SamplingParams(
            temperature=temperature, max_tokens=MAX_TOKENS, seed=2000 + number, **filters
        )
        for number, (temperature, filters) in zip(
            range(len(TEXTS)), itertools.cycle(SETTINGS), strict=False
        )
    ]
    with engine(**WIDE) as llm:
        alone = token_ids(llm.generate(TEXTS, params, use_tqdm=False))
    with engine(drafting(SLOTS, tree_nodes=NODES), **WIDE) as llm, counting(llm) as counted:
        found = token_ids(llm.generate(TEXTS, params, use_tqdm=False))
    assert len({tuple(text) for text in alone}) > 90
    assert [n for n, text in enumerate(found) if text != alone[n]] == []
    print(f"{counted.tokens_per_step:.2f} tokens per step")
    assert counted.tokens_per_step > 1.5


def test_unseeded_requests_have_the_targets_law(reference: DenseReference) -> None:
    """Their noise is what V2 draws for requests without a seed, which the head must know, too."""
    text = prompts()[1]
    prompt = tuple(tokenizer()(text)["input_ids"])
    params = SamplingParams(temperature=1, top_k=TOP_K, max_tokens=DEPTH, ignore_eos=True)
    with engine(drafting(SLOTS, tree_nodes=NODES), **WIDE) as llm, counting(llm) as counted:
        outputs = llm.generate([text] * SAMPLES, params, use_tqdm=False)
    samples = [tuple(output.outputs[0].token_ids) for output in outputs]
    laws = {n: joint_law(reference, prompt, n, 1.0) for n in range(1, DEPTH + 1)}
    assert_law(laws, samples)
    assert len(set(samples)) > 20
    # The second token was a node of the tree as a rule: trees did decide it.
    assert counted["spec_decode_num_accepted_tokens"] > 0.3 * counted["spec_decode_num_drafts"]
