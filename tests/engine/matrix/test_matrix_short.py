"""Every request feature, on one engine with speculation and one without, V1 runner."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm import LLM, RequestOutput

from support.drafts import truth, watching
from support.engines import Job, drafting, engine, greedy, prompts
from support.matrix.features import REFUSED, REPEATS, SAME, Request, named
from support.matrix.requests import MAX_TOKENS, OPTIONS, by_request, difference, job, refusal
from support.outputs import continuations, token_ids
from support.paths import ROOT

COMPARED = named(SAME)
PROMPTS_EACH = 2
DASHBOARD = ROOT / "examples" / "monitoring" / "dashboard.json"
TEXTS = prompts()[100:148]
Answers = dict[str, list[RequestOutput]]


@dataclass
class Plain:
    """Answers without speculation: to the table, and to texts that may end only later."""

    answers: Answers
    bare: Answers  # to the same prompts with no feature at all
    later: Job
    later_answers: list[RequestOutput]


@pytest.fixture(scope="module")
def plain() -> Plain:
    with engine(None, **OPTIONS) as llm:
        everything = job(COMPARED, PROMPTS_EACH)
        answers = by_request(COMPARED, everything.run(llm))
        bare = by_request(COMPARED, Job(everything.prompts, greedy(MAX_TOKENS)).run(llm))
        ends = [len(ids) for (ids,) in token_ids(Job(TEXTS, greedy(24)).run(llm))]
        later = Job(TEXTS, [greedy(40, min_tokens=end + 2) for end in ends])
        return Plain(answers, bare, later, later.run(llm))


@pytest.fixture(scope="module")
def llm(plain: Plain) -> Iterator[LLM]:
    with engine(drafting(4), **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def found(llm: LLM, plain: Plain) -> Answers:
    """All features in one batch, with drafts forced so that every acceptance count occurs."""
    known = continuations([output for outputs in plain.answers.values() for output in outputs])
    with watching(truth(known)) as watch:
        answers = by_request(COMPARED, job(COMPARED, PROMPTS_EACH).run(llm))
    assert min(watch.helped[n] for n in range(1, 5)) > 0
    return answers


@pytest.mark.parametrize("name", [r.name for r in COMPARED])
def test_same_as_without_speculation(found: Answers, plain: Plain, name: str) -> None:
    assert difference(found[name], plain.answers[name]) == ""


@pytest.mark.parametrize("request_", named(REFUSED), ids=str)
def test_refused_with_one_message(llm: LLM, request_: Request) -> None:
    message = refusal(llm, request_)
    assert re.search(request_.message, message), message
    assert "\n" not in message
    assert Job(prompts()[:1], greedy(2)).run(llm), "the engine goes on"


@pytest.mark.parametrize("request_", named(REPEATS), ids=str)
def test_repeats_itself(llm: LLM, request_: Request) -> None:
    once, again = (job([request_], 4).run(llm) for _ in range(2))
    assert difference(once, again) == ""


def test_features_change_the_output(plain: Plain) -> None:
    """A feature that does nothing to these prompts would be tested by nothing."""
    for request in COMPARED:
        changed = token_ids(plain.answers[request.name]) != token_ids(plain.bare[request.name])
        assert changed or not request.changes_output, request.name


@pytest.mark.usefixtures("found")
def test_the_dashboard_reads_what_is_counted() -> None:
    """After requests of every kind, /metrics has each series that the Grafana dashboard draws."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    drawn = {name for query in queries for name in re.findall(r"(?:vllm|specformer):\w+", query)}
    page = generate_latest(REGISTRY).decode()
    samples = dict(re.findall(r"^([a-z]\w*:\w+)(?:\{.*\})? (\S+)$", page, flags=re.MULTILINE))
    assert len(drawn) >= 12
    assert drawn <= samples.keys()
    assert float(samples["specformer:draft_steps_total"]) > 10
    assert float(samples["specformer:draft_seconds_total"]) > 0


def test_drafts_count_towards_a_minimum(llm: LLM, plain: Plain) -> None:
    """A text may end on the token after the drafts that bring it to its minimum."""
    with watching(truth(continuations(plain.later_answers))) as watch:
        found = plain.later.run(llm)
    assert min(watch.helped[n] for n in range(1, 5)) > 0
    assert difference(found, plain.later_answers) == ""
    reasons = [o.outputs[0].finish_reason for o in found]
    assert reasons.count("stop") >= 10, "texts that end by themselves are what this is about"
