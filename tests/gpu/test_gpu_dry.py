"""The dry form: everything the GPU benchmark does, at toy sizes in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu
import pytest
from gpu_stages.arms import ARMS, PUBLISHED, find


def dry(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """All units of the stages that were run."""
    paths = ["--out", str(folder), "--scratch", str(folder)]
    code = gpu.main(["--dry", "--minutes", "60", *paths, *arguments])
    found = {}
    for path in sorted(folder.glob("stage-?.json")):
        found |= json.loads(path.read_text())["units"]
    assert code == 0, found
    return found


def check_steps(name: str, unit: dict[str, Any]) -> None:
    arm = find(name.split()[1])
    assert [row["batch"] for row in unit["rows"]] == [1, 3]
    assert unit["runner"] == ("V1" if arm.on_v1 else "V2")
    assert (unit["drafter"] is None) == (arm.head is None)
    for row in unit["rows"]:
        # Nine steps: the mean may be off by a third of a token.
        assert row["tokens_per_step"] == pytest.approx(arm.length, abs=0.34)
        assert (row["draft_ms"] > 0) == (arm.head is not None)


def test_one_arm(tmp_path: Path) -> None:
    found = dry(tmp_path, "--stage", "d", "--only", "specformer-k4")
    assert list(found) == ["toy specformer-k4"]
    check_steps("toy specformer-k4", found["toy specformer-k4"])
    assert found["toy specformer-k4"]["drafter"] == "SpecFormerSpeculator"


def test_steps_of_trees(tmp_path: Path) -> None:
    check_steps_of_trees(dry(tmp_path, "--stage", "d", "--only", "tree")["pair tree-n16"])


def check_steps_of_trees(unit: dict[str, Any]) -> None:
    assert (unit["runner"], unit["drafter"]) == ("V2", "CandidateSpeculator")
    assert [row["batch"] for row in unit["rows"]] == [1, 3]
    assert all(row["draft_ms"] > 0 for row in unit["rows"])


@pytest.mark.slow
def test_all_stages(tmp_path: Path) -> None:
    found = dry(tmp_path)
    assert found["machine"]["doctor"]["ok"]
    assert found["kernels"]["rows"]
    assert "kernel" not in found["correct"]["rows"][0]
    assert found["specformer, eager"]["drafter"] == "SpecFormerSpeculator"
    assert found["specformer, eager"]["dense"]["wrong"] == []
    assert found["specformer, eager"]["dense"]["compared"] >= 40
    none = found["none, eager"]["answers"]
    assert none["greedy"] == none["greedy in groups"]
    assert found["specformer, eager"]["answers"]["greedy"] == none["greedy"]
    assert found["coupled, eager"]["answers"] == none
    assert found["coupled, eager"]["counters"]["accepted_tokens"] > 0
    assert all(row["agrees"] for row in found["acceptance"]["engine"])
    assert found["tree, eager"]["answers"] == none  # seeded ones, too
    assert found["tree, eager"]["counters"]["accepted_tokens"] > 0
    assert found["tree, eager"]["drafter"] == "CandidateSpeculator"
    check_steps_of_trees(found["pair tree-n16"])
    assert [row["drafts"] for row in found["toy draft step"]["rows"]] == [3, 3]
    for arm in (*ARMS, *PUBLISHED):
        check_steps(f"toy {arm.name}", found[f"toy {arm.name}"])
