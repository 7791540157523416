"""The target's states of the training texts, in a file that all trainings share.

A text's states are made when a training first asks for them. What that takes is counted apart, so
the budget of every head is training alone, whoever comes first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.packing import Budget, collate, plan_all
from vllm_specformer.training.rows import texts_of
from vllm_specformer.training.texts import Texts

_BATCH_TOKENS = 2048


class Aside:
    """Process cpu-seconds that do not count."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - started


class TargetStates:
    """States behind each of the target's layers; the last is the one before the final norm.

    Args:
        place: directory of the file.
        target: hooked behind all its layers.
        texts: whose states they are.
        aside: is told what it takes to make them.
    """

    def __init__(self, place: Path, target: HookedTarget, texts: Texts, aside: Aside) -> None:
        self.target, self.texts, self.aside = target, texts, aside
        self.layers = len(target.layers)
        if tuple(target.hook_ids) != tuple(range(1, self.layers + 1)):
            raise ValueError(f"hooks {target.hook_ids}: all of 1 to {self.layers} are kept")
        place.mkdir(parents=True, exist_ok=True)
        width = target.target.config.hidden_size
        shape = (int(texts.offsets[-1]), self.layers, width)
        self._states = _open(place / "states.f16", np.float16, shape)
        self._is_made = _open(place / "states.made", np.uint8, (len(texts),))

    def make(self, indices: Iterable[int]) -> None:
        """See to it that the states of these texts are there."""
        missing = np.array([i for i in indices if not self._is_made[i]], dtype=np.int64)
        if not len(missing):
            return
        with self.aside.counted():
            for batch in plan_all(self.texts.lengths[missing], Budget(_BATCH_TOKENS)):
                self._keep([[int(missing[i]) for i in row] for row in batch])

    def _keep(self, batch: list[list[int]]) -> None:
        rows = run_target(self.target, collate(self.texts, batch, None, None), packed=True)
        states = torch.stack(rows.hooked_states, dim=2).half().numpy()
        for row, first, index in texts_of(batch, self.texts):
            start, end = self.texts.offsets[index : index + 2]
            self._states[start:end] = states[row, first : first + end - start]
            self._is_made[index] = 1

    def of(self, index: int) -> Tensor:
        """A text's states, float32 [tokens, layers, H]."""
        start, end = self.texts.offsets[index : index + 2]
        return torch.from_numpy(np.asarray(self._states[start:end])).float()


def _open(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A file of zeros, as large as it is asked for, or what is in it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if path.exists() and path.stat().st_size != size:
        raise SystemExit(f"{path} belongs to other answers; remove it")
    return np.memmap(path, dtype=dtype, mode="r+" if path.exists() else "w+", shape=shape)
