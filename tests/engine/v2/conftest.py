"""The V2 runner on the CPU, through Triton's interpreter: a process of its own, or nothing.

The interpreter and the stand-in backend must be in place before vLLM is imported, and then hold for
the whole process. So these tests run in the child that `test_v2_runner.py` starts, and any other
pytest run leaves the folder alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.environment import prepare_interpreted_engines

if TYPE_CHECKING:
    from support.dense import DenseReference
    from support.outputs import Tokens

MARKER = "SPECFORMER_V2_TESTS"
PERSONALITY = "SPECFORMER_PERSONALITY"

collect_ignore_glob: list[str] = []

if os.environ.get(MARKER) == "1":
    prepare_interpreted_engines()
else:
    collect_ignore_glob.append("*")


@pytest.fixture(scope="session", autouse=True)
def whole_run() -> Iterator[None]:
    """The personality that every engine of this run is to have, if one is asked for."""
    name = os.environ.get(PERSONALITY)
    if not name:
        yield
        return
    from support.personalities import personality
    from support.v2.engines import SMALL

    with personality(name) as changes:
        SMALL.update(changes)
        yield


@pytest.fixture(scope="session")
def answers() -> dict[Tokens, Tokens]:
    """Greedy continuations by the target alone, on the V2 runner."""
    from support.v2.engines import LONG, MAX_TOKENS, TEXTS, plain_answers

    return plain_answers([*TEXTS, *LONG], MAX_TOKENS)


@pytest.fixture(scope="session")
def reference() -> DenseReference:
    from support.dense import DenseReference

    return DenseReference()
