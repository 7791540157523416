"""Runs the matrix of the V2 runner in a process of its own; see tests/engine/v2/conftest.py."""

from __future__ import annotations

import pytest

from support.matrix.features import ENGINES, V2
from support.v2.child import ADAPTERS, MATRIX, run_child


@pytest.mark.matrix
def test_v2_matrix(capfd: pytest.CaptureFixture[str]) -> None:
    engines = sum(V2 in engine.expected for engine in ENGINES)
    run_child(capfd, [str(MATRIX), str(ADAPTERS)], 3 + engines)
