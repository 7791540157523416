"""Targets of many families: hooked states, greedy parity and drafts, from training to serving.

A family is a tiny random target, a head that `specformer train` made for it in 50 steps on the
target's own answers, and two engines one after the other. One family stands for all in the default
tests; `make test-families` runs all of them and writes build/families.csv (see docs/families.md).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.family_pairs import make_pair
from support.family_targets import FAMILIES, TRIED
from support.paths import ROOT
from support.served_pairs import Outcome, served

COLUMNS = (
    "family",
    "architecture",
    "particular",
    "states",
    "same output",
    "drafts (wrong)",
    "tokens per step",
)
# Texts alone, so that no processor is wanted; `test_images.py` sends images.
TEXTS_ALONE = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
OPTIONS: dict[str, dict[str, Any]] = {
    # A head needs every token's page, which vLLM keeps of windowed layers only if told to.
    "mistral-sliding": {"disable_hybrid_kv_cache_manager": True},
    "qwen2.5-vl": TEXTS_ALONE,
    "qwen3-vl": TEXTS_ALONE,
}
# vLLM's classes of these read images or import those that do.
WANT_TORCHVISION = {"qwen2.5-vl", "qwen3-vl"}


@pytest.fixture(scope="module")
def table() -> Iterator[list[Sequence[Any]]]:
    """Rows for build/families.csv, written when the last family is through."""
    rows: list[Sequence[Any]] = []
    yield rows
    path = ROOT / "build" / "families.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


@pytest.mark.slow
def test_one_family_for_all(tmp_path: Path) -> None:
    """Scaled embeddings, softcap, layers that differ, sliding windows, shared K/V: all in one."""
    check("gemma4", tmp_path)


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path, table: list[Sequence[Any]]) -> None:
    if family in WANT_TORCHVISION:
        pytest.importorskip("torchvision", reason="make test-families brings it")
    outcome = check(family, tmp_path)
    (architecture,) = json.loads((tmp_path / "target" / "config.json").read_text())["architectures"]
    drafts = f"{outcome.compared} ({len(outcome.wrong)})"
    states, per_step = f"{outcome.states:.0e}", f"{outcome.tokens_per_step:.2f}"
    particular = FAMILIES[family].particular
    table.append((family, architecture, particular, states, "yes", drafts, per_step))


@pytest.mark.families
@pytest.mark.parametrize("family", TRIED)
def test_training_alone(family: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family)
    assert (pair.head / "model.safetensors").is_file()


def check(family: str, folder: Path) -> Outcome:
    return served(make_pair(folder, family), **OPTIONS.get(family, {}))
