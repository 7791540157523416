"""With trees of candidates the text is the one without speculation, token for token."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput

from support.engines import drafting, greedy
from support.outputs import Tokens, continuations, counting, token_ids
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, engine, plain_answers, runner
from support.v2.trees import watching_trees
from vllm_specformer.engine.candidates.sampler import CandidateSampler
from vllm_specformer.engine.candidates.speculator import CandidateSpeculator

SLOTS = 8


def trees(nodes: int, **changes: Any) -> dict[str, Any]:
    return drafting(SLOTS, tree_nodes=nodes, **changes)


@pytest.mark.parametrize("nodes", [4, 16, 63])
def test_greedy_text(nodes: int, answers: dict[Tokens, Tokens]) -> None:
    texts = TEXTS[: 12 if nodes == 16 else 6]
    with engine(trees(nodes)) as llm, watching_trees(llm) as watch, counting(llm) as counted:
        assert type(runner(llm).speculator) is CandidateSpeculator
        assert type(runner(llm).rejection_sampler) is CandidateSampler
        outputs = llm.generate(texts, greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    assert len(continuations(outputs)) == len(texts)
    print(f"{nodes} nodes: {counted.tokens_per_step:.2f} tokens per step, {dict(watch.moved)}")
    assert counted.tokens_per_step > 1.8
    assert watch.moved[True] > 0, "every path was the first rows of its tree"
    assert watch.moved[False] > 0


def test_prompts_in_chunks(answers: dict[Tokens, Tokens]) -> None:
    """Chunks above and below 64 rows, beside trees."""
    changes = {"max_num_batched_tokens": 96, "max_num_seqs": 4}
    with engine(trees(16), **changes) as llm, watching_trees(llm) as watch:
        outputs = llm.generate([*LONG[:2], *TEXTS[:4]], greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    assert watch.rows["beyond the block"] > 0
    assert watch.rows["prompt in the block"] > 0


def test_cached_prefixes(answers: dict[Tokens, Tokens]) -> None:
    """Blocks that hold moved K and V serve other requests: prompts that go on where texts ended."""
    with engine(trees(16), enable_prefix_caching=True, block_size=32) as llm:
        first = llm.generate(TEXTS[:4], greedy(40, ignore_eos=True), use_tqdm=False)
        again = [
            {"prompt_token_ids": [*o.prompt_token_ids, *o.outputs[0].token_ids, 15]} for o in first
        ]
        with counting(llm) as counted:
            outputs = llm.generate(again, greedy(MAX_TOKENS), use_tqdm=False)
    assert counted["prefix_cache_hits"] >= 32 * len(first)
    with engine() as llm:
        alone = llm.generate(again, greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs) == continuations(alone)


def test_preempted_requests() -> None:
    texts, long = TEXTS[:4], {"ignore_eos": True}
    expected = plain_answers(texts, 48, **long)
    few = {"max_model_len": 128, "num_gpu_blocks_override": 9, "block_size": 32}
    with engine(trees(16), **few) as llm, counting(llm) as counted:
        outputs = llm.generate(texts, greedy(48, **long), use_tqdm=False)
    assert continuations(outputs) == expected
    assert counted["num_preemptions"] > 0


MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.5, "seed": 4, "presence_penalty": 0.8},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.5, "seed": 5, "top_k": 20, "logprobs": 3},
    {"temperature": 1.0, "seed": 6, "n": 2},
    {"temperature": 0.0, "stop": ["return"]},
    {"temperature": 0.0, "min_tokens": 8},
    {"temperature": 0.0, "bad_words": ["self", "None", "return"]},
    {"temperature": 1.0, "seed": 7, "ignore_eos": True},
    {"temperature": 0.0, "structured_outputs": {"regex": "[a-z]{4} = [0-9]+"}},
)


def mixed(texts: list[str]) -> tuple[list[str], list[SamplingParams]]:
    from vllm.sampling_params import StructuredOutputsParams

    params = []
    for settings in MIXED:
        grammar = settings.get("structured_outputs")
        own = {} if grammar is None else {"structured_outputs": StructuredOutputsParams(**grammar)}
        params.append(SamplingParams(max_tokens=14, **(settings | own)))
    return texts[: len(params)], params


def test_requests_of_all_kinds_in_one_batch() -> None:
    """Each has the text, and the log-probabilities, that it has without speculation."""
    jobs = mixed(TEXTS)
    with engine() as llm:
        alone = llm.generate(*jobs, use_tqdm=False)
    with engine(trees(16)) as llm, counting(llm) as counted:
        outputs = llm.generate(*jobs, use_tqdm=False)
    assert token_ids(outputs) == token_ids(alone)
    assert counted["spec_decode_num_accepted_tokens"] > 0
    for found, expected in zip(outputs, alone, strict=True):
        for one, other in zip(found.outputs, expected.outputs, strict=True):
            assert one.finish_reason == other.finish_reason
            for mine, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
                assert mine.keys() == theirs.keys()
                assert [mine[t].logprob for t in mine] == pytest.approx(
                    [theirs[t].logprob for t in mine], abs=1e-4
                )


def test_requests_that_come_and_go(answers: dict[Tokens, Tokens]) -> None:
    """State rows change tenants in the middle of a batch; an aborted request's tree goes."""
    with engine(trees(16), max_num_seqs=4) as llm, watching_trees(llm) as watch:
        core = llm.llm_engine
        for number, text in enumerate(TEXTS[:10]):
            core.add_request(str(number), text, greedy(MAX_TOKENS))
        found, steps = {}, 0
        while core.has_unfinished_requests():
            steps += 1
            if steps in (4, 6):
                core.abort_request([str(steps)])
            for output in core.step():
                if output.finished:
                    found |= continuations([output])
    assert len(found) >= 8
    whole = {prompt: text for prompt, text in found.items() if text == answers[prompt]}
    assert len(whole) >= 8
    assert all(answers[prompt][: len(text)] == text for prompt, text in found.items())
    assert watch.tenants > 4


def test_a_schedule_of_nodes(answers: dict[Tokens, Tokens]) -> None:
    """Many nodes for one request, few for some, none for more, and back."""
    schedule = [[1, 1, 16], [2, 3, 5], [4, 8, 0]]
    speculative = trees(16, tree_nodes_per_batch_size=schedule)
    params = [greedy(tokens) for tokens in (MAX_TOKENS, 6, 4, 3, 3, 2)]
    with engine(speculative) as llm, watching_trees(llm) as watch:
        outputs = llm.generate(TEXTS[:6], params, use_tqdm=False)
    found = continuations(outputs)
    assert all(answers[p][: len(t)] == t for p, t in found.items())
    assert set(watch.nodes) >= {0, 5, 16}


def test_up_to_the_longest_text() -> None:
    """The scheduler cuts trees where a text ends, by number or at the model's length."""
    texts = TEXTS[:3]
    for changes, tokens in (({"max_model_len": 96}, 96), ({}, 1)):
        params = greedy(tokens, ignore_eos=True)
        with engine(None, **changes) as llm:
            alone = llm.generate(texts, params, use_tqdm=False)
        with engine(trees(16), **changes) as llm:
            outputs = llm.generate(texts, params, use_tqdm=False)
        assert token_ids(outputs) == token_ids(alone)


def test_a_dummy_step_after_a_batch_of_trees(answers: dict[Tokens, Tokens]) -> None:
    """An idle rank of data parallelism runs along with rows of zeros, more than a block holds."""
    with engine(trees(16)) as llm:
        first = llm.generate(TEXTS[:3], greedy(MAX_TOKENS), use_tqdm=False)
        step = SchedulerOutput.make_empty()
        step.num_scheduled_tokens, step.total_num_scheduled_tokens = {"dummy": 300}, 300
        runner(llm).execute_model(step, dummy_run=True)
        again = llm.generate(TEXTS[3:6], greedy(MAX_TOKENS), use_tqdm=False)
    assert (continuations(first) | continuations(again)).items() <= answers.items()
