"""Runs the matrix of the V2 runner in a process of its own; see tests/engine/v2/conftest.py."""

from __future__ import annotations

import pytest
from test_v2_runner import ADAPTERS, MATRIX, run_child

from .features import ENGINES, V2


@pytest.mark.matrix
def test_v2_matrix(capfd: pytest.CaptureFixture[str]) -> None:
    engines = sum(V2 in engine.expected for engine in ENGINES)
    run_child(capfd, [str(MATRIX), str(ADAPTERS)], 3 + engines)
