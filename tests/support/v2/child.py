"""Runs tests of `tests/engine/v2` in a process of their own; see its conftest for why.

The child's whole output is shown when it fails. Its summary, and what took it long, go to
`build/v2-child.txt`, because workers of pytest-xdist swallow what a passing test prints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from support.paths import ROOT

FOLDER = ROOT / "tests" / "engine" / "v2"
MATRIX = FOLDER / "test_matrix_v2.py"  # with `make test-matrix`
ADAPTERS = FOLDER / "test_adapters_v2.py"  # likewise
CANDIDATES = FOLDER / "candidates"  # by tests/engine/test_v2_candidates.py
REPORT = ROOT / "build" / "v2-child.txt"
LIMIT_SECONDS = 1800
LONG_SECONDS = 15
_DURATION = re.compile(r"[\d.]+s (setup|call|teardown) ")


def run_child(capfd: pytest.CaptureFixture[str], arguments: list[str], at_least: int) -> None:
    options = ["-rP", "-p", "no:cacheprovider", "--durations=0", f"--durations-min={LONG_SECONDS}"]
    command = [sys.executable, "-m", "pytest", *arguments, *options]
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
    report = "\n".join([" ".join(arguments), summary, *filter(_DURATION.match, lines)])
    with capfd.disabled():
        print(f"\n[V2 runner, child process] {report}")
    REPORT.parent.mkdir(exist_ok=True)
    with REPORT.open("a") as file:
        print(report, file=file)
    if child.returncode:
        pytest.fail(f"the child exited with {child.returncode}:\n{child.stdout}", pytrace=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", summary)}
    assert counts.get("passed", 0) >= at_least, child.stdout
    assert not counts.keys() & {"skipped", "deselected", "xfailed", "xpassed", "failed"}, (
        child.stdout
    )
