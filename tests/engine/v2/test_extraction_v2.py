"""Hidden states for training, extracted on the V2 runner."""

from __future__ import annotations

from pathlib import Path

from support.extracted_states import assert_as_in_transformers


def test_states_are_those_of_transformers(tmp_path: Path) -> None:
    assert_as_in_transformers(tmp_path, "V2")
