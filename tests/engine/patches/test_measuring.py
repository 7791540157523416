"""An engine that is held at a number of drafts."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_specformer.engine.patches.measuring import hold_drafts, listing_schedule


def test_a_schedule_names_every_count() -> None:
    assert listing_schedule([0, 4, 2]) == [[1, 1, 0], [2, 2, 4], [3, 3, 2]]


def test_every_batch_size_drafts_as_many() -> None:
    lookup = [0, 4, 4, 2]
    scheduler = SimpleNamespace(dynamic_sd_lookup=lookup)
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    hold_drafts(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)), 3)
    assert scheduler.dynamic_sd_lookup is lookup
    assert lookup == [3, 3, 3, 3]
