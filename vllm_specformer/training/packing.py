"""Which texts share a step, and how they lie side by side in its rows.

A plan depends on the texts' lengths, the seed and the epoch only, and every random draw on the seed
and the number of the batch. So a run that is continued sees what an uninterrupted one would have
seen, and nothing has to be remembered.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_specformer.training.texts import Texts

PackedRow = list[int]  # indices of texts that lie side by side
Batch = list[PackedRow]

# Texts are sorted by length among so many batches' worth: enough for little padding, few enough
# that batches stay random samples.
_WINDOW = 16
# The rest of an epoch makes a batch of its own only if it fills this share of one.
_SMALLEST = 0.5


@dataclass(frozen=True)
class Budget:
    """How much one batch holds: `tokens` (rows times row length), or a number of `texts`.

    `packed`: several texts may share a row.
    """

    tokens: int
    texts: int | None = None
    packed: bool = True


def plan_epoch(lengths: np.ndarray, budget: Budget, seed: int, epoch: int) -> list[Batch]:
    """All batches of one epoch; each text is in at most one.

    Args:
        lengths: tokens of every text, int64 [texts].
        budget: what a batch holds. One text that is longer than the budget fills a batch.
    """
    rng = np.random.default_rng((seed, 0, epoch))
    order = rng.permutation(len(lengths)).tolist()
    window = _WINDOW * (budget.texts or max(1, round(budget.tokens / float(lengths.mean()))))
    batches: list[Batch] = []
    waiting: list[int] = []
    for first in range(0, len(order), window):
        waiting += order[first : first + window]
        waiting.sort(key=lambda index: -int(lengths[index]))
        last = first + window >= len(order)
        while waiting and (last or _fills(waiting, lengths, budget) >= 2):
            share = _fills(waiting, lengths, budget)
            batch = _fill(waiting, lengths, budget)
            if share >= _SMALLEST or not batches:
                batches.append(batch)
    return [batches[i] for i in rng.permutation(len(batches))]


def plan_all(lengths: np.ndarray, budget: Budget) -> list[Batch]:
    """Batches that hold every text once, longest first."""
    waiting = np.argsort(-lengths, kind="stable").tolist()
    batches = []
    while waiting:
        batches.append(_fill(waiting, lengths, budget))
    return batches


def _fills(waiting: Sequence[int], lengths: np.ndarray, budget: Budget) -> float:
    """How many batches the waiting texts make, about."""
    if budget.texts:
        return len(waiting) / budget.texts
    return float(lengths[waiting].sum()) / budget.tokens


def _fill(waiting: list[int], lengths: np.ndarray, budget: Budget) -> Batch:
    """Take one batch out of `waiting`, which is sorted by falling length.

    Rows are as long as its longest text: attention costs grow with the row's length, so short texts
    do not pay for a long row.
    """
    capacity = int(lengths[waiting[0]])
    num_rows = budget.texts or max(1, budget.tokens // capacity)
    if budget.texts or not budget.packed:
        batch = [[index] for index in waiting[:num_rows]]
        del waiting[:num_rows]
        return batch
    batch = []
    room: list[int] = []
    left = []
    for index in waiting:
        length = int(lengths[index])
        fitting = [free for free in room if free >= length]
        if len(batch) < num_rows:
            batch.append([index])
            room.append(capacity - length)
        elif fitting:
            row = room.index(min(fitting))
            batch[row].append(index)
            room[row] -= length
        else:
            left.append(index)
    waiting[:] = left
    return batch


def draw_slots(counts: Sequence[int], seed: int, step: int) -> int:
    """Number of slots to run in a step, the same in all processes."""
    return int(np.random.default_rng((seed, 2, step)).choice(counts))


def collate(
    texts: Texts, batch: Batch, per_text: int | None, rng: np.random.Generator | None
) -> dict[str, Tensor]:
    """Lay a batch's texts into rows and choose anchors.

    Args:
        per_text: anchors drawn per text, on average over the batch: every row gets as many as
            another, so that none has to be filled up, whatever share of it is answers. None takes
            all.
        rng: for the drawing.

    Returns:
        `input_ids`, `position_ids` (restarting with every text) and `segments` (number of the text
        within its row), int64 [rows, T]; padding is a segment of its own. `anchors` and `ends`, the
        end of the answer each anchor drafts in, int64 [rows, A]; the end of an anchor that only
        fills its row is 0.
    """
    width = max(sum(len(texts.input_ids(i)) for i in row) for row in batch)
    input_ids, position_ids, segments = np.zeros((3, len(batch), width), dtype=np.int64)
    anchors, ends = [], []
    quota = None if per_text is None else math.ceil(per_text * sum(map(len, batch)) / len(batch))
    for number, row in enumerate(batch):
        start = 0
        chosen, limits = [], []
        for segment, index in enumerate(row):
            tokens = texts.input_ids(index)
            part = slice(start, start + len(tokens))
            input_ids[number, part] = tokens
            position_ids[number, part] = np.arange(len(tokens))
            segments[number, part] = segment
            found = texts.anchors(index)
            chosen.append(found[0] + start)
            limits.append(found[1] + start)
            start += len(tokens)
        position_ids[number, start:] = np.arange(width - start)
        segments[number, start:] = len(row)
        keep = _draw(sum(map(len, chosen)), quota, rng)
        anchors.append(np.concatenate(chosen)[keep])
        ends.append(np.concatenate(limits)[keep])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "segments": torch.from_numpy(segments),
        "anchors": _padded(anchors),
        "ends": _padded(ends),
    }


def _draw(count: int, quota: int | None, rng: np.random.Generator | None) -> np.ndarray:
    """Indices of at most `quota` of so many things, in order."""
    if quota is None or count <= quota:
        return np.arange(count)
    assert rng is not None
    return np.sort(rng.choice(count, quota, replace=False))


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.from_numpy(values)
    return padded


class Batches(torch.utils.data.Dataset):
    """The batches of a whole run by number: item `n` is what process `n % processes` gets.

    Args:
        steps: optimiser steps; None runs `epochs` times through the texts.
        per_step: batches of one optimiser step over all processes.
    """

    def __init__(
        self,
        texts: Texts,
        indices: np.ndarray,
        budget: Budget,
        *,
        per_text: int | None,
        slot_counts: Sequence[int],
        seed: int,
        per_step: int,
        steps: int | None,
        epochs: int,
    ) -> None:
        self.texts, self.indices, self.budget, self.seed = texts, indices, budget, seed
        self.per_text, self.slot_counts, self.per_step = per_text, tuple(slot_counts), per_step
        self._lengths = texts.lengths[indices]
        self._plans: list[list[Batch]] = []
        self._planning = threading.Lock()  # states may be made ahead, by a thread
        if steps is None:
            while len(self._plans) < epochs:
                self._plan()
            steps = max(1, sum(map(len, self._plans)) // per_step)
        self.steps = steps

    def _plan(self) -> None:
        epoch = len(self._plans)
        self._plans.append(plan_epoch(self._lengths, self.budget, self.seed, epoch))

    def __len__(self) -> int:
        return self.steps * self.per_step

    def batch(self, number: int) -> Batch:
        """Indices of the texts of one batch."""
        for epoch in range(number + 1):
            with self._planning:
                if epoch == len(self._plans):
                    self._plan()
            plan = self._plans[epoch]
            if number < len(plan):
                return [[int(self.indices[i]) for i in row] for row in plan[number]]
            number -= len(plan)
        raise AssertionError("every epoch has a batch")

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, 1, number))
        batch = self.batch(number)
        fields = collate(self.texts, batch, self.per_text, rng)
        slots = draw_slots(self.slot_counts, self.seed, number // self.per_step)
        tokens = int(self.texts.lengths[[i for row in batch for i in row]].sum())
        return fields | {"num_slots": slots, "num_tokens": tokens, "texts": batch, "number": number}
