"""The whole matrix on the V1 runner: pairs of request features, an engine per engine feature."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager

import pytest
from vllm import LLM

from support import engines
from support.drafts import Watch, truth, watching
from support.matrix.features import ENGINES, REFUSED, SAME, V1, Engine, named, pairs
from support.matrix.records import record
from support.matrix.requests import OPTIONS
from support.matrix.trial import Runner, try_engine, try_refused_and_repeated, try_requests
from support.outputs import Tokens

pytestmark = pytest.mark.matrix


def helping(llm: LLM, known: Mapping[Tokens, Tokens]) -> AbstractContextManager[Watch]:
    return watching(truth(known))


RUNNER = Runner(V1, engines.engine, helping, texts=10, max_tokens=20)


def test_requests_and_their_pairs() -> None:
    singles, together = named(SAME), pairs()
    assert len(together) >= 200
    differences = try_requests(RUNNER, [*singles, *together], 1, OPTIONS)
    assert {name: d for name, d in differences.items() if d} == {}
    record(V1, "requests", dict.fromkeys((r.name for r in singles), SAME), pairs=len(together))


def test_refused_and_repeated() -> None:
    record(V1, "requests", try_refused_and_repeated(RUNNER, OPTIONS))


@pytest.mark.parametrize("feature", [e for e in ENGINES if V1 in e.expected], ids=lambda e: e.name)
def test_engine(feature: Engine) -> None:
    outcome = try_engine(RUNNER, feature)
    assert outcome.kind == feature.expected[V1], outcome.detail
    if outcome.kind == REFUSED:
        assert re.search(feature.message, outcome.detail), outcome.detail
    record(V1, "engines", {feature.name: outcome.kind})
