"""Runs `tests/engine/v2` in a process of its own; see its conftest for why.

The child's whole output is shown when it fails, its summary always.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "v2"
ROOT = FOLDER.parents[2]
FAMILIES = FOLDER / "test_family_groups.py"  # with `make test-families`
BLOCK_RULE = FOLDER / "test_vllm_block_rule.py"  # with `make test-statistics`
MATRIX = FOLDER / "test_matrix_v2.py"  # with `make test-matrix`
ADAPTERS = FOLDER / "test_adapters_v2.py"  # likewise
# Fewer would mean that tests vanished, for example because a file is no longer collected.
MIN_PASSED = 40
LIMIT_SECONDS = 1800


def test_v2_runner(capfd: pytest.CaptureFixture[str]) -> None:
    """Every test of the V2 folder passes; none is skipped or left out."""
    apart = [f"--ignore={file}" for file in (FAMILIES, MATRIX, ADAPTERS, BLOCK_RULE)]
    run_child(capfd, [str(FOLDER), *apart], MIN_PASSED)


@pytest.mark.slow
def test_coupled_verification_of_a_hundred_texts(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECFORMER_COUPLED_TEXTS", "100")
    run_child(capfd, [str(FOLDER / "test_coupled.py")], 7)


@pytest.mark.families
def test_families_with_several_groups(capfd: pytest.CaptureFixture[str]) -> None:
    run_child(capfd, [str(FAMILIES)], 2)


@pytest.mark.statistics
def test_the_bias_of_the_block_rule(capfd: pytest.CaptureFixture[str]) -> None:
    run_child(capfd, [str(BLOCK_RULE)], 2)


def run_child(capfd: pytest.CaptureFixture[str], arguments: list[str], at_least: int) -> None:
    command = [sys.executable, "-m", "pytest", *arguments, "-rP", "-p", "no:cacheprovider"]
    environment = os.environ | {"SPECFORMER_V2_TESTS": "1", "PYTHONUNBUFFERED": "1"}
    child = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    lines = child.stdout.strip().splitlines()
    summary = lines[-1] if lines else "no output"
    with capfd.disabled():
        print(f"\n[V2 runner, child process] {summary}")
    if child.returncode:
        pytest.fail(f"the child exited with {child.returncode}:\n{child.stdout}", pytrace=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", summary)}
    assert counts.get("passed", 0) >= at_least, child.stdout
    assert not counts.keys() & {"skipped", "deselected", "xfailed", "xpassed", "failed"}, (
        child.stdout
    )
