"""A worker's warm-up includes the head's kernels; a head's weights cannot be replaced."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specformer.engine.patches.worker import (
    compile_or_warm_up_model,
    start_draft_weight_update,
)
from vllm_specformer.names import ARCHITECTURE
from vllm_specformer.pairing import HeadWeightError


def worker(architecture: str, runner: Any = None) -> Any:
    draft = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    speculative = SimpleNamespace(draft_model_config=draft)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(speculative_config=speculative), model_runner=runner
    )


def warmed_up(architecture: str = ARCHITECTURE, speculates: bool = True) -> list[str]:
    """What happens, in order."""
    done: list[str] = []
    speculator = SimpleNamespace(
        warm_up=lambda: done.append("head"), end_warm_up=lambda: done.append("forgotten")
    )
    runner = SimpleNamespace(speculator=speculator) if speculates else SimpleNamespace()

    def original(self: Any) -> str:
        done.append("vllm")
        return "times"

    assert compile_or_warm_up_model(original, worker(architecture, runner)) == "times"
    return done


def test_kernels_are_compiled_before_vllm_watches_for_it() -> None:
    assert warmed_up() == ["head", "vllm", "forgotten"]


def test_other_drafters_and_workers_without_one_are_left_alone() -> None:
    assert warmed_up("EagleModel") == ["vllm"]
    assert warmed_up(speculates=False) == ["vllm"]


def test_an_update_of_the_head_is_refused_before_anything_is_lost() -> None:
    done: list[Any] = []
    with pytest.raises(HeadWeightError, match="leave the draft model out of the update"):
        start_draft_weight_update(done.append, worker(ARCHITECTURE))
    assert done == []
    start_draft_weight_update(done.append, worker("EagleModel"))
    assert len(done) == 1
