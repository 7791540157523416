"""A feature tried: the same requests with and without speculation, on either runner."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams

from support.engines import Job, drafting, greedy, prompts
from support.matrix.features import REFUSED, REPEATS, SAME, Engine, Request, named
from support.matrix.requests import by_request, difference, job, refusal
from support.outputs import Tokens, continuations

DRAFTS = 4


@dataclass(frozen=True)
class Runner:
    """How to start an engine on a runner, and to help its drafts along known continuations."""

    name: str
    engine: Callable[..., AbstractContextManager[LLM]]
    helping: Callable[[LLM, Mapping[Tokens, Tokens]], AbstractContextManager[Any]]
    texts: int  # requests per engine
    max_tokens: int
    plain: dict[str, list[RequestOutput]] = field(default_factory=dict)

    def job(self) -> Job:
        """Short and long prompts, the long ones sharing beginnings; one request is sampled."""
        long = ["\n\n\n".join(prompts()[60 : 62 + n]) for n in range(2)]
        texts = [*prompts()[: self.texts], *long]
        params = [greedy(self.max_tokens) for _ in texts]
        params[0] = SamplingParams(temperature=1, top_k=1, max_tokens=self.max_tokens)
        params[1] = greedy(self.max_tokens, logprobs=2)
        params[2] = greedy(self.max_tokens, ignore_eos=True)
        return Job(texts, params)


@dataclass(frozen=True)
class Outcome:
    """What came of a feature: `kind` as in the table, or "differs" with what differs."""

    kind: str
    detail: str = ""


def try_requests(
    runner: Runner, requests: Sequence[Request], prompts_each: int, options: Mapping[str, Any]
) -> dict[str, str]:
    """What each feature's answers differ in with speculation, all features in one batch."""
    asked = job(requests, prompts_each)
    with runner.engine(None, **options) as llm:
        expected = asked.run(llm)
    known = continuations(expected)
    with runner.engine(drafting(DRAFTS), **options) as llm, runner.helping(llm, known) as watch:
        found = asked.run(llm)
    assert min(watch.helped[n] for n in range(1, DRAFTS + 1)) > 0
    theirs, ours = by_request(requests, expected), by_request(requests, found)
    return {name: difference(ours[name], theirs[name]) for name in theirs}


def try_refused_and_repeated(runner: Runner, options: Mapping[str, Any]) -> dict[str, str]:
    """Features that are refused with their message, or whose answers repeat; by name."""
    outcomes = {}
    with runner.engine(drafting(DRAFTS), **options) as llm:
        for request in named(REFUSED):
            message = refusal(llm, request)
            assert re.search(request.message, message), message
            assert Job(prompts()[:1], greedy(2)).run(llm), "the engine goes on"
            outcomes[request.name] = REFUSED
        for request in named(REPEATS):
            once, again = (job([request], 2).run(llm) for _ in range(2))
            assert difference(once, again) == ""
            outcomes[request.name] = REPEATS
    return outcomes


def try_engine(runner: Runner, feature: Engine) -> Outcome:
    """Ask twice, so that the second time finds what the first left in the prefix cache."""
    asked = runner.job()
    expected = plain_answers(runner, feature)
    known = continuations(expected)
    speculative = drafting(DRAFTS, **feature.speculative)
    with ExitStack() as stack:
        try:
            llm = stack.enter_context(runner.engine(speculative, **feature.options))
        # vLLM refuses with any of these when it starts; what a running engine raises is a failure.
        except (ValueError, NotImplementedError, RuntimeError) as error:
            return Outcome(REFUSED, str(error))
        watch = stack.enter_context(runner.helping(llm, known))
        found = [asked.run(llm), asked.run(llm)]
    differences = [difference(answers, expected) for answers in found]
    if any(differences):
        return Outcome("differs", next(d for d in differences if d))
    assert watch.helped.total() > 0, "no draft was looked at"
    return Outcome(SAME)


def plain_answers(runner: Runner, feature: Engine) -> list[RequestOutput]:
    """Without speculation; with the feature's options only where they alone change the answers."""
    name = feature.name if feature.alters else ""
    if feature.expected[runner.name] == REFUSED:
        return []
    if name not in runner.plain:
        with runner.engine(None, **feature.options if feature.alters else {}) as llm:
            runner.plain[name] = runner.job().run(llm)
    return runner.plain[name]
