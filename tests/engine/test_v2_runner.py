"""Runs `tests/engine/v2` in a process of its own; see its conftest for why."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.personalities import FP8, NAMES
from support.processor import wants_fp8_cache
from support.v2.child import ADAPTERS, CANDIDATES, FOLDER, MATRIX, run_child

FAMILIES = FOLDER / "test_family_groups.py"  # with `make test-families`
IMAGES = FOLDER / "test_images_v2.py"  # likewise
DISTRIBUTION = FOLDER / "test_distribution.py"  # with `make test-slow`
SLEEP = FOLDER / "test_sleep.py"  # likewise
ADAPTIVE = FOLDER / "test_adaptive_more.py"  # likewise
WARM_UP = FOLDER / "test_warm_up.py"  # likewise
BLOCK_RULE = FOLDER / "test_vllm_block_rule.py"  # with `make test-statistics`
APART = (
    *(FAMILIES, IMAGES, MATRIX, ADAPTERS, BLOCK_RULE, DISTRIBUTION),
    *(SLEEP, ADAPTIVE, WARM_UP, CANDIDATES),
)
# Fewer would mean that tests vanished, for example because a file is no longer collected.
MIN_PASSED = 40


def test_v2_runner(capfd: pytest.CaptureFixture[str]) -> None:
    """Every test of the V2 folder passes; none is skipped or left out."""
    apart = [f"--ignore={file}" for file in APART]
    run_child(capfd, [str(FOLDER), *apart], MIN_PASSED)


@pytest.mark.slow
def test_coupled_verification_of_a_hundred_texts(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECFORMER_COUPLED_TEXTS", "100")
    run_child(capfd, [str(FOLDER / "test_coupled.py")], 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parity_and_drafts_under_each_personality(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECFORMER_PERSONALITY", name)
    suites = ["greedy_parity", "drafts_match_dense"]
    if name != "replayed":  # has graphs of its own
        suites += ["graph_ready", "speculator_v2"]
    run_child(capfd, [str(FOLDER / f"test_{suite}.py") for suite in suites], 8)


@pytest.mark.slow
@wants_fp8_cache
def test_parity_beside_an_fp8_cache(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECFORMER_PERSONALITY", FP8)
    tests = ("four_drafts", "other_numbers_of_drafts")
    run_child(capfd, [f"{FOLDER / 'test_greedy_parity.py'}::test_{test}" for test in tests], 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "least"), [(DISTRIBUTION, 2), (SLEEP, 4), (ADAPTIVE, 12), (WARM_UP, 1)]
)
def test_what_takes_long(file: Path, least: int, capfd: pytest.CaptureFixture[str]) -> None:
    run_child(capfd, [str(file)], least)


@pytest.mark.families
def test_families_with_several_groups(capfd: pytest.CaptureFixture[str]) -> None:
    run_child(capfd, [str(FAMILIES)], 2)


@pytest.mark.families
def test_images(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision", reason="make test-families brings it")
    run_child(capfd, [str(IMAGES)], 1)


@pytest.mark.statistics
def test_the_bias_of_the_block_rule(capfd: pytest.CaptureFixture[str]) -> None:
    run_child(capfd, [str(BLOCK_RULE)], 2)
