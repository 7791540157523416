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
from pathlib import Path

import torch
from torch import Tensor

from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packing import Batch
from vllm_specformer.training.rows import lay_out, parts_of, texts_of
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
        self._dtype, self._parts = torch.float32, 0

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
        self._dtype, self._parts = states.dtype, states.shape[2]
        for row, first, index in texts_of(batch, self.texts):
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
        laid_out = lay_out(self._states_of, batch, self.texts, fields["input_ids"].shape[1])
        *hooked, last = parts_of(laid_out, target.device, self._dtype)
        moved = {name: value.to(target.device) for name, value in fields.items()}
        return HookedRows(hooked, last, **moved)

    def _states_of(self, index: int) -> Tensor:
        """A text's states [tokens, ids, H]: those that are hooked, and the last."""
        start, size = self._places[index]
        content = bytearray(os.pread(self._file.fileno(), size, start))
        states = torch.frombuffer(content, dtype=self._dtype)
        return states.view(int(self.texts.lengths[index]), self._parts, -1)
