"""What requests ask for besides plain greedy decoding, on the V2 runner."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from support.dense import DenseReference
from support.engines import Job, drafting, greedy
from support.outputs import Tokens, continuations, token_ids
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import MAX_TOKENS, TEXTS, K, engine, speculator


def chosen_by(regex: str | None = None, choice: list[str] | None = None) -> SamplingParams:
    structured = StructuredOutputsParams(regex=regex, choice=choice)
    return greedy(MAX_TOKENS, structured_outputs=structured)


JOBS = {
    "stop": Job(TEXTS[:4], greedy(16, stop=["\n", "="])),
    "stop tokens": Job(TEXTS[:4], greedy(16, stop_token_ids=list(range(200, 330)))),
    "penalties": Job(
        TEXTS[:4],
        greedy(12, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.5),
    ),
    "logprobs": Job(TEXTS[:4], greedy(8, logprobs=3, prompt_logprobs=1)),
    "structured": Job(
        TEXTS[:3],
        [chosen_by(regex=r"[a-f]{3,8}x[0-9]+"), chosen_by(choice=["yes", "maybe not"]), greedy(10)],
    ),
    # vLLM refuses n > 1 at temperature 0, and the interpreter its top-k kernel. This cold and
    # seeded, every completion is the greedy one.
    "several": Job(TEXTS[:2], SamplingParams(temperature=0.01, seed=3, n=3, max_tokens=8)),
}


@pytest.fixture(scope="module")
def plain() -> dict[str, list[RequestOutput]]:
    with engine() as llm:
        return {name: job.run(llm) for name, job in JOBS.items()}


def test_features_equal_plain(
    plain: dict[str, list[RequestOutput]], answers: dict[Tokens, Tokens]
) -> None:
    found, helped = {}, Counter[int]()
    with engine(drafting(K)) as llm:
        for name, job in JOBS.items():
            # Where the job's own greedy text is known the oracle makes acceptances happen.
            known = {p: t for p, t in continuations(plain[name]).items() if t}
            with watching(llm, known) as watch:
                found[name] = job.run(llm)
            helped += watch.helped
            assert watch.drafted, name
        sampled_beside_greedy(llm, answers)
    for name in JOBS:
        assert token_ids(found[name]) == token_ids(plain[name]), name
        texts = [[c.text for c in o.outputs] for o in found[name]]
        assert texts == [[c.text for c in o.outputs] for o in plain[name]], name
        reasons = [[(c.finish_reason, c.stop_reason) for c in o.outputs] for o in found[name]]
        assert reasons == [
            [(c.finish_reason, c.stop_reason) for c in o.outputs] for o in plain[name]
        ], name
    assert min(helped[n] for n in range(K + 1)) > 0
    assert any(c.outputs[0].finish_reason == "stop" for c in found["stop"])
    penalised = continuations(found["penalties"])
    assert any(t[:MAX_TOKENS] != answers[p] for p, t in penalised.items()), "no penalty told"
    assert found["structured"][1].outputs[0].text in ("yes", "maybe not")
    assert [len(c) for c in token_ids(found["several"])] == [3, 3]
    assert_logprobs_close(found["logprobs"], plain["logprobs"])


def sampled_beside_greedy(llm: LLM, answers: dict[Tokens, Tokens]) -> None:
    """Greedy requests keep their text in a batch with sampled ones, seeded ones repeat theirs."""
    params = [
        greedy(MAX_TOKENS)
        if n % 2
        else SamplingParams(temperature=0.9, seed=n, max_tokens=MAX_TOKENS)
        for n in range(6)
    ]
    with watching(llm, answers) as watch:
        first = llm.generate(TEXTS[:6], params, use_tqdm=False)
    assert watch.helped.total() > 0
    second = llm.generate(TEXTS[:6], params, use_tqdm=False)
    assert continuations(first[1::2]).items() <= answers.items()
    assert continuations(second[1::2]).items() <= answers.items()
    assert not continuations(first[::2]).items() <= answers.items(), "sampling sampled nothing"


def assert_logprobs_close(
    found: Sequence[RequestOutput], expected: Sequence[RequestOutput]
) -> None:
    compared = 0
    for ours, theirs in zip(found, expected, strict=True):
        mine, other = ours.outputs[0].logprobs, theirs.outputs[0].logprobs
        assert mine is not None
        assert other is not None
        for a, b in zip(mine, other, strict=True):
            assert a.keys() == b.keys()
            for token in a:
                assert math.isclose(a[token].logprob, b[token].logprob, abs_tol=1e-3)
                compared += 1
    assert compared >= 60


def test_schedule_by_batch_size(reference: DenseReference, answers: dict[Tokens, Tokens]) -> None:
    """Large batches draft less, then nothing at all; the K/V are complete all the same."""
    schedule = [(1, 2, K), (3, 4, 2), (5, 8, 0)]
    # Prompts whose answer does not end early, so that the batch shrinks as planned.
    full = [t for t, a in zip(TEXTS, answers.values(), strict=False) if len(a) == MAX_TOKENS]
    params = [greedy(n) for n in (2, 2, 2, 4, 5, MAX_TOKENS, MAX_TOKENS)]
    speculative = drafting(K, num_speculative_tokens_per_batch_size=schedule)
    with engine(speculative) as llm, watching(llm) as watch:
        model = speculator(llm).model
        slots: list[int] = []
        forward = model.forward
        model.forward = lambda *args: slots.append(args[-1]) or forward(*args)
        outputs = llm.generate(full[:7], params, use_tqdm=False)
    found = continuations(outputs)
    assert all(answers[p][: len(t)] == t for p, t in found.items())
    print(f"steps by number of drafts {dict(watch.tokens)}; ", end="")
    assert watch.tokens.keys() == {0, 2, K}
    assert len(slots) == watch.tokens[2] + watch.tokens[K]
    assert slots.count(2) == watch.tokens[2], "drafted more than the schedule asks for"
    assert_all_equal(reference, watch, at_least=10)


def test_probabilistic_drafts(answers: dict[Tokens, Tokens]) -> None:
    """Drafts sampled from the head at temperature 0.8: they vary, and their logits are cached."""
    params = SamplingParams(temperature=0.8, max_tokens=8, seed=7)
    with engine(drafting(K)) as llm:
        ours = speculator(llm)
        assert ours.draft_logits is not None
        ours.draft_logits.fill_(float("nan"))
        with watching(llm) as watch:
            first = llm.generate(TEXTS[:4], params, use_tqdm=False)
        # Four requests ran, so four rows of the cache are filled, all their columns.
        rows = ours.draft_logits.isfinite().all(dim=-1)
        assert rows.all(dim=-1).sum() == 4
        assert not rows[~rows.all(dim=-1)].any()
        second = llm.generate(TEXTS[:4], params, use_tqdm=False)
        greedy_outputs = llm.generate(TEXTS[:4], greedy(8), use_tqdm=False)
    assert all(len(d.drafts) == K for d in watch.drafted)
    assert token_ids(first) == token_ids(second), "a seeded request did not repeat itself"
    assert all(answers[p][: len(t)] == t for p, t in continuations(greedy_outputs).items())


@pytest.mark.parametrize("column_dtype", [torch.int32, torch.int64])
def test_the_interpreter_samples_into_a_cache(column_dtype: torch.dtype) -> None:
    """vLLM's sampling kernel alone: what it caches, where, and what an inert row leaves alone."""
    torch.manual_seed(0)
    logits, cache = torch.randn(3, 2000), torch.zeros(4, 2, 2000)
    sampled = gumbel_sample(
        logits,
        torch.tensor([2, 0, -1]),
        torch.tensor([0.0, 0.8, 0.0, 0.8]),
        torch.arange(4),
        torch.arange(3),
        apply_temperature=True,
        is_drafting=True,
        logits_cache=cache,
        logits_cache_col=torch.tensor([1, 0, 1], dtype=column_dtype),
    )
    assert sampled[:2].tolist() == logits[:2].argmax(-1).tolist()
    expected = torch.zeros_like(cache)
    expected[2, 1], expected[0, 0] = logits[0], logits[1]
    assert torch.equal(cache, expected)
