"""States from the file are those that the target gives; the file stays within its bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from support.file_limits import file_limit
from support.training_runs import train
from support.training_texts import make_texts
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packing import Batch, collate
from vllm_specformer.training.state_cache import StateCache
from vllm_specformer.training.texts import Texts

HOOKS = (0, 2, 4)
GIB = 2**30


@pytest.fixture
def texts() -> Texts:
    return make_texts(6, 40)


@pytest.fixture
def calls(
    target_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[HookedTarget, list[int]]]:
    """A target, and the number of texts' rows in each of its runs."""

    def made() -> tuple[HookedTarget, list[int]]:
        found: list[int] = []
        target = HookedTarget(target_model, HOOKS)
        run = HookedTarget.__call__

        def counted(self: HookedTarget, *args: Any) -> Any:
            found.append(len(args[0]))
            return run(self, *args)

        monkeypatch.setattr(HookedTarget, "__call__", counted)
        return target, found

    return made


def same(one: HookedRows, other: HookedRows, batch: Batch) -> None:
    """All states at the anchors' texts, padding aside, and everything else."""
    for a, b in zip(one.hooked_states, other.hooked_states, strict=True):
        assert a.dtype == b.dtype
    inside = one.segments < torch.tensor([[len(row)] for row in batch])  # the next one is padding
    for a, b in zip(
        [*one.hooked_states, one.last_states],
        [*other.hooked_states, other.last_states],
        strict=True,
    ):
        torch.testing.assert_close(a[inside], b[inside], rtol=1e-9, atol=1e-9)
    for name in ("input_ids", "position_ids", "segments", "anchors", "ends"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_other_batches_of_known_texts_need_no_target(
    texts: Texts, calls: Callable[[], Any], tmp_path: Path
) -> None:
    target, ran = calls()
    cache = StateCache(tmp_path, GIB, texts)
    first: list[Batch] = [[[0, 1], [2]], [[3, 4], [5]]]
    for batch in first:
        fields = collate(texts, batch, None, None)
        same(cache.rows(target, fields, batch, True), run_target(target, fields, True), batch)
    assert len(cache) == 6
    del ran[:]
    for batch in ([[5, 0], [1, 3]], [[2], [4]]):
        fields = collate(texts, batch, None, None)
        found = cache.rows(target, fields, batch, True)
        assert ran == []
        same(found, run_target(target, fields, True), batch)
        del ran[:]


def test_it_stays_within_its_bound(texts: Texts, calls: Callable[[], Any], tmp_path: Path) -> None:
    target, ran = calls()
    batch: Batch = [[0, 1], [2]]
    fields = collate(texts, batch, None, None)
    unbounded = StateCache(tmp_path, GIB, texts)
    unbounded.rows(target, fields, batch, True)
    cache = StateCache(tmp_path, unbounded.used - 1, texts)
    cache.rows(target, fields, batch, True)
    assert len(cache) == 2
    assert cache.used < unbounded.used
    del ran[:]
    cache.rows(target, fields, batch, True)
    assert ran == [2]


def test_a_full_disk_ends_the_keeping_alone(
    texts: Texts, calls: Callable[[], Any], tmp_path: Path
) -> None:
    target, _ = calls()
    batch: Batch = [[0], [1], [2]]
    fields = collate(texts, batch, None, None)
    cache = StateCache(tmp_path, GIB, texts)
    with file_limit(10_000):
        rows = cache.rows(target, fields, batch, True)
    same(rows, run_target(target, fields, True), batch)
    assert len(cache) < 3
    same(cache.rows(target, fields, batch, True), rows, batch)


def test_a_training_is_the_same_with_it(pair: Path, tmp_path: Path) -> None:
    losses = []
    for gib in (0, 1):
        out = tmp_path / str(gib)
        train(pair, out, cache_states=gib, epochs=3, max_steps=None)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in log if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
