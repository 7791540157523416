"""States of the target, kept from one epoch to the next: the frozen target runs once per text.

They lie in an unnamed file of bounded size, which is gone with the process, however that ends. A
continued run fills it anew. A text's states come from the first batch it was in; that its
neighbours there were others changes them by rounding, so a continued run is no copy of an
undisturbed one, bit by bit, as it is without the file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.packed_head import HookedRows
from vllm_specformer.training.packing import Batch
from vllm_specformer.training.texts import Texts

_OF_FREE = 0.25  # of the disk's free space that the file may take at most


class StateCache:
    """Gives the rows of a batch: from the file if it has all their texts, else from the target.

    Args:
        directory: whose disk the file is on.
        limit: bytes it may take; a quarter of the disk's free space at most.
        texts: whose states they are.
    """

    def __init__(self, directory: Path, limit: int, texts: Texts) -> None:
        self.texts = texts
        self.limit = min(limit, int(_OF_FREE * shutil.disk_usage(directory).free))
        self.used = 0
        self._places: dict[int, tuple[int, int]] = {}  # text -> first byte, bytes
        self._file = tempfile.TemporaryFile(dir=directory, prefix=".states.")  # noqa: SIM115
        self._dtype = torch.float32

    def __len__(self) -> int:
        """Texts that it has."""
        return len(self._places)

    def rows(
        self, target: HookedTarget, fields: dict[str, Tensor], batch: Batch, packed: bool
    ) -> HookedRows:
        """What `run_target` gives for the texts of `batch`, laid out in `fields`."""
        if all(index in self._places for row in batch for index in row):
            return self._read(target, fields, batch)
        rows = run_target(target, fields, packed)
        if self.used < self.limit:
            self._keep(rows, batch)
        return rows

    def _keep(self, rows: HookedRows, batch: Batch) -> None:
        states = torch.stack([*rows.hooked_states, rows.last_states], dim=2).cpu()
        self._dtype = states.dtype
        for row, first, index in _texts_of(batch, self.texts):
            size = states[row, first].numel() * states.element_size()
            length = int(self.texts.lengths[index])
            if index in self._places or self.used + size * length > self.limit:
                continue
            part = states[row, first : first + length].contiguous()
            content = part.flatten().view(torch.uint8).numpy().tobytes()
            try:
                written = os.pwrite(self._file.fileno(), content, self.used)
            except OSError:  # the disk is full after all
                written = 0
            if written < len(content):
                self.limit = self.used
                return
            self._places[index] = (self.used, len(content))
            self.used += len(content)

    def _read(self, target: HookedTarget, fields: dict[str, Tensor], batch: Batch) -> HookedRows:
        count, width = fields["input_ids"].shape
        parts = len(target.hook_ids) + 1
        found: Tensor | None = None
        for row, first, index in _texts_of(batch, self.texts):
            start, size = self._places[index]
            content = bytearray(os.pread(self._file.fileno(), size, start))
            states = torch.frombuffer(content, dtype=self._dtype)
            states = states.view(int(self.texts.lengths[index]), parts, -1)
            if found is None:  # padding is 0: no anchor sees it
                found = states.new_zeros(count, width, parts, states.shape[-1])
            found[row, first : first + len(states)] = states
        assert found is not None
        device = target.target.device
        *hooked, last = found.to(device).unbind(2)
        moved = {name: value.to(device) for name, value in fields.items()}
        return HookedRows([part.contiguous() for part in hooked], last.contiguous(), **moved)


def _texts_of(batch: Sequence[Sequence[int]], texts: Texts) -> list[tuple[int, int, int]]:
    """Row, first place in it, and index of every text of a batch."""
    found = []
    for row, indices in enumerate(batch):
        first = 0
        for index in indices:
            found.append((row, first, index))
            first += int(texts.lengths[index])
    return found
