"""Paths in files that travel mean the same from any working directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vllm_specformer.bench.arms import Arm, build
from vllm_specformer.bench.cells import Cell, Cells, Key
from vllm_specformer.data.prompts import scan
from vllm_specformer.head_fields import HeadConfigError
from vllm_specformer.places import check_target_name, lasting
from vllm_specformer.target.files import target_record

TARGET = Path(__file__).resolve().parents[2] / "examples" / "models" / "python-target"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; it holds "target" and "prompts.jsonl"."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "target").symlink_to(TARGET)
    (here / "prompts.jsonl").write_text('{"prompt": "def f():"}\n')
    monkeypatch.chdir(here)
    return here


def test_lasting_names(here: Path) -> None:
    assert lasting("target") == lasting(Path("./target/")) == str(here / "target")
    assert lasting("target/../python-specformer") == str(TARGET.parent / "python-specformer")
    for other in ("acme/model", "no/such/path", "s3://bucket/model", "x" * 5000):
        assert lasting(other) == other


def test_what_distilled_answers_come_from(here: Path) -> None:
    record = target_record("target", Path("target"), None)
    assert record.name_or_path == str(here / "target")
    assert scan([Path("prompts.jsonl")]).files[0].file == str(here / "prompts.jsonl")


def test_arms_of_a_benchmark(here: Path) -> None:
    (_, other) = build([], "HEAD", 8, None, {"other": {"method": "eagle3", "model": "target"}})
    assert other.speculative == {"method": "eagle3", "model": str(here / "target")}
    (_, untrained) = build(["ngram"], "HEAD", 8, None, {})
    assert "model" not in (untrained.speculative or {})


def test_measurements_of_before_are_found_again(here: Path) -> None:
    """A benchmark begun with a relative path goes on where it is continued from the same place."""
    numbers: dict[str, Any] = {name: 1 for name in Cell.__dataclass_fields__}
    lists = {"accepted_at": [1], "lengths": [1], "texts": ["x"]}
    relative = {"method": "specformer", "model": "target", "num_speculative_tokens": 2}
    cell = Cell(**numbers | lists | {"arm": "k2", "speculative": relative})
    cells = Cells(here / "cells")
    cells.keep(cell)
    now = relative | {"model": str(here / "target")}
    found = cells.find(Key(1, 1, "k2"), Arm("k2", now))
    assert found is not None
    assert asdict(found) == json.loads(json.dumps(asdict(cell)))
    assert cells.find(Key(1, 1, "k2"), Arm("k2", now | {"num_speculative_tokens": 3})) is None


def test_names_for_a_head_to_be(here: Path) -> None:
    head = here / "runs" / "head"
    for name in ("/srv/models/target", "../target", "./target", "acme/target", "s3://bucket/t"):
        check_target_name(name, head)
    for name in ("target", "models/of/mine", "a b"):
        with pytest.raises(HeadConfigError, match=f"--target-name {name}: a head's file names"):
            check_target_name(name, head)
