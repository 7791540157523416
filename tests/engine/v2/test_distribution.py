"""Sampled text has the target's distribution on the V2 runner with the default, drawn drafts.

As `tests/engine/v1/test_distribution.py`, with as many samples as the interpreter makes in minutes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from support.dense import DenseReference
from support.engines import drafting, greedy, prompts, tokenizer
from support.laws import TOP_K, assert_law, joint_law
from support.outputs import Tokens, counting, token_ids
from support.v2.drafts import watching
from support.v2.engines import K, engine, speculator

SAMPLES = 160
DEPTH = 2  # the second token is the first that drafts decide
TOP_P = 0.85
WIDE = {"max_num_seqs": 40, "max_num_batched_tokens": 512}
PROMPT = prompts()[1]


def sample(llm: LLM, **changes: Any) -> list[Tokens]:
    params = SamplingParams(
        n=SAMPLES, temperature=1, top_k=TOP_K, max_tokens=DEPTH, ignore_eos=True, **changes
    )
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    assert len(output.outputs) == SAMPLES
    return [tuple(c.token_ids) for c in output.outputs]


def test_the_default_has_the_targets_law(reference: DenseReference) -> None:
    prompt = tuple(tokenizer()(PROMPT)["input_ids"])
    with engine(drafting(K), **WIDE) as llm:
        assert speculator(llm).draft_logits is not None
        laws = {n: joint_law(reference, prompt, n, 1.0, TOP_P) for n in range(1, DEPTH + 1)}
        with watching(llm) as watch, counting(llm) as counted:
            assert_law(laws, sample(llm, top_p=TOP_P, seed=3))
    at_one_text = Counter(d.text for d in watch.drafted).most_common(1)[0][0]
    assert len({d.drafts for d in watch.drafted if d.text == at_one_text}) > 10
    assert counted["spec_decode_num_accepted_tokens"] > 0.05 * counted["spec_decode_num_drafts"]


def test_what_each_request_of_a_batch_gets(answers: dict[Tokens, Tokens]) -> None:
    """Best tokens under a grammar and with one token to choose, drawn ones beside them.

    The cache that vLLM verifies by knows of best tokens as certain ones.
    """
    grammar = StructuredOutputsParams(regex="[a-z]{6,12}")
    texts = prompts()[:4]
    params = [
        SamplingParams(temperature=1, seed=1, max_tokens=6, structured_outputs=grammar),
        SamplingParams(temperature=1, seed=2, max_tokens=6, top_k=1),
        SamplingParams(temperature=1, seed=3, max_tokens=6),
        greedy(6),
    ]
    with engine(drafting(K)) as llm:
        ours = speculator(llm)
        assert ours.draft_logits is not None
        ours.draft_logits.fill_(float("nan"))
        outputs = llm.generate(texts, params, use_tqdm=False)
        finite = ours.draft_logits.isfinite().sum(-1)
        again = llm.generate(texts[:3], params[:3], use_tqdm=False)
        # The rows have new tenants, all of which draw.
        ours.draft_logits.fill_(float("nan"))
        llm.generate(texts, params[2], use_tqdm=False)
        after = ours.draft_logits.isfinite().sum(-1)
    vocabulary = ours.draft_logits.shape[-1]
    used = finite[finite.any(-1)].tolist()
    assert sorted(used) == [[1] * K, [1] * K, [vocabulary] * K, [vocabulary] * K]
    assert sorted(after[after.any(-1)].tolist()) == [[vocabulary] * K] * 4
    assert token_ids(again) == token_ids(outputs[:3]), "seeded requests did not repeat themselves"
    for number in (1, 3):  # with one token to choose from, sampled text is greedy text
        output = outputs[number]
        text = tuple(output.outputs[0].token_ids)
        assert answers[tuple(output.prompt_token_ids or ())][: len(text)] == text
    assert outputs[0].outputs[0].text.isalpha()
