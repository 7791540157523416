"""The matrix on the V2 runner, in the interpreter; started by `tests/engine/matrix`."""

from __future__ import annotations

import re

import pytest

from support.matrix.features import ENGINES, REFUSED, SAME, V2, Engine, named, pairs
from support.matrix.records import record
from support.matrix.requests import OPTIONS
from support.matrix.trial import Runner, try_engine, try_refused_and_repeated, try_requests
from support.v2.drafts import watching
from support.v2.engines import engine

RUNNER = Runner(V2, engine, watching, texts=4, max_tokens=8)
ROOM = {**OPTIONS, "max_num_seqs": 32, "max_num_batched_tokens": 1024}
# The interpreter needs a second per pair, so it gets some of them.
PAIRS = pairs()[::11]


def test_requests_and_their_pairs() -> None:
    singles = named(SAME)
    differences = try_requests(RUNNER, [*singles, *PAIRS], 1, ROOM)
    assert {name: d for name, d in differences.items() if d} == {}
    outcomes = dict.fromkeys((r.name for r in singles), SAME)
    record(V2, "requests", outcomes, pairs=len(PAIRS))


def test_refused_and_repeated() -> None:
    record(V2, "requests", try_refused_and_repeated(RUNNER, ROOM))


@pytest.mark.parametrize("feature", [e for e in ENGINES if V2 in e.expected], ids=lambda e: e.name)
def test_engine(feature: Engine) -> None:
    outcome = try_engine(RUNNER, feature)
    assert outcome.kind == feature.expected[V2], outcome.detail
    if outcome.kind == REFUSED:
        assert re.search(feature.message, outcome.detail), outcome.detail
    record(V2, "engines", {feature.name: outcome.kind})
