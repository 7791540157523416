"""vLLM's request features give the same with speculation as without it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from support.drafts import truth, watching
from support.engines import Job, drafting, engine, greedy, prompts, run_plain
from support.outputs import Tokens, continuations, counting, token_ids

MAX_TOKENS = 24
TEXTS = prompts()[:12]
# Otherwise the little target fills its JSON with spaces until max_tokens.
COMPACT = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["get", "set"]}, "count": {"enum": [1, 22, 333]}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
REGEX = r"return (self|None)\.[a-z]{3,8}\([0-9]{1,3}\)"
CHOICE = ["return None", "return self", "raise ValueError"]


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1, max_tokens=MAX_TOKENS, seed=seed)


def structured(**constraint: Any) -> SamplingParams:
    return greedy(48, structured_outputs=StructuredOutputsParams(**constraint))


# Jobs whose result must not depend on speculation. The oracle helps every one of them along the
# plain greedy continuation, so drafts that a feature forbids are proposed, too.
JOBS = {
    "greedy": Job(TEXTS, greedy(MAX_TOKENS)),
    "stop strings": Job(TEXTS, greedy(64, stop=["return", " =", "("])),
    "stop token": Job(TEXTS, greedy(64, stop_token_ids=[30, 40, 50, 60])),
    "included stop string": Job(
        TEXTS, greedy(64, stop=["self", "if"], include_stop_str_in_output=True)
    ),
    "repetition penalty": Job(TEXTS, greedy(MAX_TOKENS, repetition_penalty=1.3)),
    "presence and frequency penalty": Job(
        TEXTS, greedy(MAX_TOKENS, presence_penalty=0.8, frequency_penalty=0.6)
    ),
    "bad words": Job(TEXTS, greedy(MAX_TOKENS, bad_words=["self", "return", "None"])),
    "minimum length": Job(TEXTS, greedy(64, min_tokens=40)),
    "allowed tokens": Job(TEXTS, greedy(MAX_TOKENS, allowed_token_ids=list(range(200, 400)))),
    "one token": Job(TEXTS, greedy(1)),
    "log-probabilities": Job(TEXTS, greedy(MAX_TOKENS, logprobs=3, prompt_logprobs=2)),
    "regex": Job(TEXTS, structured(regex=REGEX)),
    "choice": Job(TEXTS, structured(choice=CHOICE)),
    "json": Job(TEXTS, structured(json=SCHEMA)),
}

Plain = dict[str, list[RequestOutput]]


@pytest.fixture(scope="module")
def plain() -> Plain:
    return run_plain(JOBS, **COMPACT)


@pytest.fixture(scope="module")
def llm(plain: Plain) -> Iterator[LLM]:
    with engine(drafting(4), **COMPACT) as llm:
        yield llm


@pytest.mark.parametrize("oracle", [False, True], ids=["head", "oracle"])
@pytest.mark.parametrize("name", JOBS)
def test_same_as_without_speculation(llm: LLM, plain: Plain, name: str, oracle: bool) -> None:
    expected = plain[name]
    with watching(truth(continuations(expected)) if oracle else None) as watch:
        found = JOBS[name].run(llm)
    assert token_ids(found) == token_ids(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.outputs[0].text == b.outputs[0].text
        assert a.outputs[0].finish_reason == b.outputs[0].finish_reason
        assert a.outputs[0].stop_reason == b.outputs[0].stop_reason
    if oracle and name != "one token":
        assert sum(watch.helped[n] for n in range(1, 5)) > 0


def test_the_features_change_the_output(plain: Plain) -> None:
    """A feature that does nothing to these prompts would be tested by nothing."""
    reference = token_ids(plain["greedy"])
    for name in JOBS.keys() - {"greedy", "log-probabilities"}:
        assert token_ids(plain[name]) != reference, name
    reasons = {o.outputs[0].stop_reason for o in plain["stop strings"]}
    assert reasons & {"return", " =", "("}


def test_forbidden_drafts_are_refused(llm: LLM, plain: Plain) -> None:
    """The oracle drafts the unconstrained text, of which the constraint allows little."""
    for name in ("bad words", "repetition penalty", "regex", "stop strings"):
        with watching(truth(continuations(plain["greedy"]), insist=True)) as watch:
            found = JOBS[name].run(llm)
        assert token_ids(found) == token_ids(plain[name]), name
        assert sum(watch.helped[n] for n in range(1, 5)) > 0


def test_structured_output_is_valid(llm: LLM, plain: Plain) -> None:
    with watching(truth(continuations(plain["json"]))):
        for output in JOBS["json"].run(llm):
            assert json.loads(output.outputs[0].text)["name"] in ("get", "set")
    for output in JOBS["regex"].run(llm):
        assert re.fullmatch(REGEX, output.outputs[0].text)
    assert {o.outputs[0].text for o in JOBS["choice"].run(llm)} <= set(CHOICE)


def values(positions: Sequence[Any] | None) -> list[dict[int, float]]:
    return [{t: v.logprob for t, v in (p or {}).items()} for p in positions or []]


def assert_close(found: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert sorted(a.values()) == pytest.approx(sorted(b.values()), abs=1e-4)
        for token in a.keys() & b.keys():
            assert a[token] == pytest.approx(b[token], abs=1e-4)
        assert a.keys() == b.keys() or min(len(a), len(b)) > 1, "only ties may change places"


def test_log_probabilities(llm: LLM, plain: Plain) -> None:
    expected = plain["log-probabilities"]
    with watching(truth(continuations(expected))):
        found = JOBS["log-probabilities"].run(llm)
    for a, b in zip(found, expected, strict=True):
        assert len(a.outputs[0].logprobs or []) == len(a.outputs[0].token_ids)
        assert_close(values(a.outputs[0].logprobs), values(b.outputs[0].logprobs))
        assert_close(values(a.prompt_logprobs), values(b.prompt_logprobs))
        assert a.outputs[0].cumulative_logprob == pytest.approx(
            b.outputs[0].cumulative_logprob, abs=1e-3
        )
        assert math.isfinite(a.outputs[0].cumulative_logprob or math.nan)


def test_sampled_requests_leave_greedy_ones_alone(llm: LLM, plain: Plain) -> None:
    params = [greedy(MAX_TOKENS) if i % 2 else sampled(i) for i in range(len(TEXTS))]
    with watching(truth(continuations(plain["greedy"]))):
        found = token_ids(Job(TEXTS, params).run(llm))
    expected = token_ids(plain["greedy"])
    assert found[1::2] == expected[1::2]
    assert found[0::2] != expected[0::2]


def test_several_completions_with_a_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1, seed=11, max_tokens=MAX_TOKENS)
    first = token_ids(Job(TEXTS[:3], params).run(llm))
    again = token_ids(Job(TEXTS[:3], params).run(llm))
    assert first == again
    for completions in first:
        assert len(set(completions)) > 1
    other = SamplingParams(n=4, temperature=1, seed=12, max_tokens=MAX_TOKENS)
    assert token_ids(Job(TEXTS[:3], other).run(llm)) != first


def step_until_done(llm: LLM, collected: dict[str, Tokens]) -> None:
    while llm.llm_engine.has_unfinished_requests():
        collect(llm, collected)


def collect(llm: LLM, collected: dict[str, Tokens]) -> None:
    for output in llm.llm_engine.step():
        if output.finished:
            collected[output.request_id] = tuple(output.outputs[0].token_ids)


def free_blocks(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def test_requests_join_and_leave(llm: LLM, plain: Plain) -> None:
    expected = [ids[0] for ids in token_ids(plain["greedy"])]
    collected: dict[str, Tokens] = {}
    with watching(truth(continuations(plain["greedy"]))) as watch:
        for index, text in enumerate(TEXTS):
            llm.llm_engine.add_request(f"join-{index}", text, greedy(MAX_TOKENS))
            collect(llm, collected)
            if index % 3 == 2:
                collect(llm, collected)
        step_until_done(llm, collected)
    assert len({requests for requests, _ in watch.batch_sizes}) > 3
    by_number = {int(name.split("-")[1]): ids for name, ids in collected.items()}
    assert [by_number[i] for i in range(len(TEXTS))] == expected


def test_aborted_requests_free_their_blocks(llm: LLM, plain: Plain) -> None:
    before = free_blocks(llm)
    expected = [ids[0] for ids in token_ids(plain["greedy"])]
    collected: dict[str, Tokens] = {}
    names = [f"abort-{i}" for i in range(len(TEXTS))]
    with watching(truth(continuations(plain["greedy"]))):
        for name, text in zip(names, TEXTS, strict=True):
            llm.llm_engine.add_request(name, text, greedy(MAX_TOKENS))
        for _ in range(3):
            collect(llm, collected)
        assert free_blocks(llm) < before
        # Some short answers may be complete by now.
        aborted = [name for name in names[::2] if name not in collected]
        assert len(aborted) >= 2
        llm.llm_engine.abort_request(aborted)
        step_until_done(llm, collected)
    assert collected.keys() == set(names) - set(aborted)
    assert all(collected[n] == expected[names.index(n)] for n in collected)
    assert free_blocks(llm) == before
    assert token_ids(JOBS["greedy"].run(llm)) == token_ids(plain["greedy"])


def test_acceptance_is_counted(llm: LLM, plain: Plain) -> None:
    with counting(llm) as counted, watching(truth(continuations(plain["greedy"]))):
        JOBS["greedy"].run(llm)
    assert counted["spec_decode_num_draft_tokens"] == 4 * counted["spec_decode_num_drafts"]
    accepted = counted["spec_decode_num_accepted_tokens"]
    assert 0 < accepted < counted["spec_decode_num_draft_tokens"]


@pytest.mark.parametrize("feature", [{"logit_bias": {300: 4.0}}, {"min_p": 0.1}])
def test_what_vllm_refuses_with_any_speculation(llm: LLM, feature: dict[str, Any]) -> None:
    """A limit of vLLM's V1 runner; the request is refused by name, the engine goes on."""
    with pytest.raises(
        VLLMValidationError, match=r"min_p and logit_bias .* not yet supported with spec"
    ):
        Job(TEXTS[:1], SamplingParams(temperature=1, **feature)).run(llm)
    assert Job(TEXTS[:1], greedy(4)).run(llm)
