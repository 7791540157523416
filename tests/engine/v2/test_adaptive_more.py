"""Adaptive verification and thresholds beside what else a step may bring; `make test-slow`."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from support.dense import DenseReference
from support.engines import Job, drafting, greedy, prompts, run_plain, tokenizer
from support.heads import make_head
from support.laws import TOP_K, assert_law, joint_law
from support.outputs import Tokens, continuations, token_ids
from support.paths import HEAD
from support.personalities import counting_overlaps, personality
from support.v2.adaptive import (
    ROW_COST,
    Admissions,
    adaptive_engine,
    as_it_is,
    best_prefixes,
    cut_engine,
    dense_chances,
    ties,
    watching_admissions,
    watching_chances,
)
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import LONG, MAX_TOKENS, SMALL, TEXTS, K, speculator
from support.v2.host_reads import HostReads
from support.v2.triton_ops import OUR_KERNELS, Launched, use_triton
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

CLOSE = 1e-4  # as in test_adaptive.py
GATED = {"markov_rank": 8, "markov_gate": True}
SAMPLES, DEPTH = 160, 3


def deciding_engine(
    speculative: dict[str, Any],
    threshold: float | None,
    row_cost: float = ROW_COST,
    **changes: Any,
) -> AbstractContextManager[LLM]:
    """By costs, or by a threshold."""
    if threshold is None:
        return adaptive_engine(speculative, row_cost, **changes)
    return cut_engine(speculative, threshold, **changes)


def assert_followed(seen: Admissions) -> None:
    assert seen.trimmed > 0
    for step in seen.steps:
        assert sum(step.admitted) == step.budget
        assert ties(step) or step.admitted == best_prefixes(step)


def assert_parity(found: dict[Tokens, Tokens], answers: dict[Tokens, Tokens]) -> None:
    assert found
    assert all(answers[p][: len(t)] == t for p, t in found.items())


@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("name", ["asynchronous", "replayed"])
def test_parity_and_drafts_as_a_gpu_runs_steps(
    name: str,
    threshold: float | None,
    reference: DenseReference,
    answers: dict[Tokens, Tokens],
) -> None:
    """Steps planned before the last one's text is known; all steps by padded graphs."""
    params = [greedy(MAX_TOKENS - n % 4) for n in range(9)]
    with (
        personality(name) as changes,
        deciding_engine(drafting(K), threshold, **changes) as llm,
        counting_overlaps() as overlaps,
        watching(llm, answers) as watch,
        watching_admissions() as seen,
    ):
        outputs = llm.generate([*TEXTS[:8], LONG[0]], params, use_tqdm=False)
    assert_parity(continuations(outputs), answers)
    assert_followed(seen)
    assert_all_equal(reference, watch, at_least=40)
    assert (overlaps["overlapped"] > 0) == (name == "asynchronous")


def test_cut_prompts_beside_drafts(
    reference: DenseReference, answers: dict[Tokens, Tokens]
) -> None:
    """Some rows of a step are a prompt's, which no budget leaves out."""
    with (
        adaptive_engine(drafting(K), max_num_batched_tokens=48, max_num_seqs=4) as llm,
        watching(llm, answers) as watch,
        watching_admissions() as seen,
    ):
        outputs = llm.generate([*TEXTS[:3], *LONG[:2]], greedy(MAX_TOKENS), use_tqdm=False)
    assert_parity(continuations(outputs), answers)
    assert watch.unsampled_rows > 0, "no prompt was cut"
    assert_followed(seen)
    assert_all_equal(reference, watch, at_least=40)


@pytest.mark.parametrize("markov_rank", [0, 8])
def test_a_schedule_and_a_head_of_another_kind(
    markov_rank: int, tmp_path: Path, answers: dict[Tokens, Tokens]
) -> None:
    """Fewer drafts than slots, told slot by slot, over a draft vocabulary."""
    head = make_head(tmp_path / "head", "default", markov_rank=markov_rank, draft_vocab_size=700)
    schedule = [(1, 2, K), (3, 5, 2), (6, 8, 0)]
    speculative = drafting(K, head, num_speculative_tokens_per_batch_size=schedule)
    params = [greedy(n) for n in (2, 3, 4, 6, MAX_TOKENS, MAX_TOKENS)]
    with (
        adaptive_engine(speculative, row_cost=0.05) as llm,
        watching_admissions() as seen,
        watching_chances(llm) as told,
    ):
        estimator = speculator(llm).acceptance_estimator
        assert estimator is not None
        curves = as_it_is(estimator)
        outputs = llm.generate(TEXTS[:6], params, use_tqdm=False)
        sampled = SamplingParams(temperature=0.8, seed=1, max_tokens=4)
        llm.generate(TEXTS[:2], sampled, use_tqdm=False)
    assert_parity(continuations(outputs), answers)
    assert {len(step.drafts) for step in told} == {2, K}
    reference = DenseReference(head)
    for step in told:
        assert step.chances == pytest.approx(dense_chances(reference, step, curves), abs=CLOSE)
    for admission in seen.steps:
        assert all(n <= m for n, m in zip(admission.admitted, admission.scheduled, strict=True))


def test_coupled_text_does_not_depend_on_the_budget() -> None:
    texts = prompts()[100:116]
    params = [
        SamplingParams(temperature=(0.5, 1.0)[n % 2], seed=n, max_tokens=8)
        for n in range(len(texts))
    ]
    job = Job(texts, params)
    plain = token_ids(run_plain({"all": job}, **SMALL)["all"])
    with (
        adaptive_engine(drafting(K, verification="coupled")) as llm,
        watching_admissions() as seen,
    ):
        assert token_ids(job.run(llm)) == plain
    assert_followed(seen)


def test_grammars_and_log_probabilities(answers: dict[Tokens, Tokens]) -> None:
    """Masks and rows of a request follow the device's layout, not the host's."""
    grammar = StructuredOutputsParams(regex="[a-z]{6,12}")
    texts = prompts()[:6]
    params = [
        greedy(8),
        SamplingParams(temperature=1, seed=1, max_tokens=8, structured_outputs=grammar),
        greedy(8, logprobs=2),
        greedy(8, structured_outputs=grammar),
        SamplingParams(temperature=1, seed=2, max_tokens=8, logprobs=1),
        greedy(8),
    ]
    job = Job(texts, params)
    plain = run_plain({"all": job}, **SMALL)["all"]
    with adaptive_engine(drafting(K)) as llm, watching_admissions() as seen:
        found = job.run(llm)
    assert_followed(seen)
    for n in (0, 2, 3, 5):
        assert token_ids(found[n : n + 1]) == token_ids(plain[n : n + 1])
    for n in (1, 3):
        assert found[n].outputs[0].text.isalpha()
    ours, theirs = found[2].outputs[0].logprobs, plain[2].outputs[0].logprobs
    assert ours is not None
    assert theirs is not None
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for token, value in mine.items():
            assert value.logprob == pytest.approx(other[token].logprob, abs=1e-3)


def sample(llm: LLM, text: str) -> list[Tokens]:
    params = SamplingParams(
        n=SAMPLES, temperature=1, top_k=TOP_K, max_tokens=DEPTH, ignore_eos=True, seed=5
    )
    (output,) = llm.generate([text], params, use_tqdm=False)
    return [tuple(completion.token_ids) for completion in output.outputs]


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_sampled_text_has_the_targets_law(
    reference: DenseReference, threshold: float | None
) -> None:
    text = prompts()[1]
    wide = {"max_num_seqs": 40, "max_num_batched_tokens": 512}
    prompt = tuple(tokenizer()(text)["input_ids"])
    laws = {n: joint_law(reference, prompt, n, 1.0) for n in range(1, DEPTH + 1)}
    with (
        deciding_engine(drafting(K), threshold, row_cost=0.2, **wide) as llm,
        watching_admissions() as seen,
    ):
        assert_law(laws, sample(llm, text))
    print(f"drafts admitted {dict(seen.admitted)}; ", end="")
    assert_followed(seen)
    assert len(seen.admitted) >= 3


def test_no_host_read_in_a_step(
    answers: dict[Tokens, Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafting and what it tells, on the kernels; some steps draft fewer tokens."""
    head = make_head(tmp_path / "head", "default", draft_vocab_size=700, **GATED)
    reads = HostReads()
    reads.patch(monkeypatch)
    launches = use_triton(monkeypatch, reads.pausing)
    estimator = import_module("vllm.v1.worker.gpu.spec_decode.acceptance_estimator")
    theirs = ("_local_max_sumexp_kernel", "_predict_kernel")
    for name in theirs:
        watched = Launched(getattr(estimator, name), reads.pausing, launches)
        monkeypatch.setattr(estimator, name, watched)
    propose, steps = SpecFormerSpeculator.propose, Counter[int]()

    def counted(self: SpecFormerSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        steps[kwargs["num_speculative_tokens"]] += 1
        with reads.counting():
            return propose(self, batch, *args, **kwargs)

    monkeypatch.setattr(SpecFormerSpeculator, "propose", counted)
    sampled = SamplingParams(temperature=0.8, max_tokens=6, seed=1)
    for served in (HEAD, head):
        schedule = [(1, 3, K), (4, 8, 2)]
        speculative = drafting(K, served, num_speculative_tokens_per_batch_size=schedule)
        with adaptive_engine(speculative, max_num_batched_tokens=64) as llm:
            outputs = llm.generate(
                [*TEXTS[:3], LONG[0]], [greedy(8)] * 2 + [sampled, greedy(4)], use_tqdm=False
            )
        assert_parity(continuations(outputs[:2]), answers)
    print(f"steps {dict(steps)}, launches {dict(launches)}, reads {dict(reads.found)}; ", end="")
    assert steps.keys() == {2, K}
    assert launches.keys() >= OUR_KERNELS | set(theirs)
    assert reads.found == Counter()
