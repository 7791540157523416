"""Files of states are whole, or the engine ends (the rest with real engines, see v1 and v2)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vllm_specformer.engine.extraction.connector import PARTIAL, _write, _Written
from vllm_specformer.state_files import LAYER_IDS

ABOUT = {LAYER_IDS: "0,2"}
STATES = {"hidden_states": torch.rand(3, 2, 4), "token_ids": torch.arange(3)}


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "text.safetensors"
    with ThreadPoolExecutor() as executor:
        written = _Written(executor.submit(_write, STATES, str(place), ABOUT))
    assert written.query()
    torch.testing.assert_close(load_file(place), STATES)
    with safe_open(place, "pt") as content:
        assert content.metadata() == ABOUT
    assert not place.with_name(place.name + PARTIAL).exists()


def test_a_write_that_fails_is_told(tmp_path: Path) -> None:
    place = tmp_path / "no such folder" / "text.safetensors"
    with ThreadPoolExecutor() as executor:
        written = _Written(executor.submit(_write, STATES, str(place), ABOUT))
    with pytest.raises(Exception, match="No such file"):
        written.query()
