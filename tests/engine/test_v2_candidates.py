"""Runs `tests/engine/v2/candidates` in a process of its own: a part, or all with test-slow."""

from __future__ import annotations

import pytest

from support.v2.child import CANDIDATES, run_child

SHORT = {
    "test_tree_parity.py": (
        "test_greedy_text[16]",
        "test_requests_of_all_kinds_in_one_batch",
    ),
    "test_tree_drafts.py": ("test_trees_of_greedy_and_sampled_requests[8]",),
}


def test_trees(capfd: pytest.CaptureFixture[str]) -> None:
    tests = [f"{CANDIDATES / file}::{name}" for file, names in SHORT.items() for name in names]
    run_child(capfd, tests, len(tests))


@pytest.mark.slow
def test_trees_in_full(capfd: pytest.CaptureFixture[str]) -> None:
    run_child(capfd, [str(CANDIDATES)], 30)
