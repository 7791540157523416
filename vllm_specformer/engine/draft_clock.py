"""How long the draft step takes in a running server, for whoever asks before it starts.

With the environment variable SPECFORMER_DRAFT_CLOCK=DIRECTORY every process that drafts keeps a
file there with its draft steps and their seconds, 16 bytes that are overwritten in place. Without
it nothing is measured and nothing is wrapped. vLLM's own statistics have no place for this.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

VARIABLE = "SPECFORMER_DRAFT_CLOCK"
_RECORD = struct.Struct("<Qd")
_SUFFIX = ".clock"

Propose = TypeVar("Propose", bound=Callable[..., Any])


class DraftClock:
    """Steps and seconds of one process.

    On a GPU the time is the device's own, between two events around the step. They are read once
    they have passed, so nothing ever waits for them, and the file may be a few steps behind.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{os.getpid()}{_SUFFIX}"
        path.write_bytes(_RECORD.pack(0, 0.0))
        with path.open("r+b") as file:
            self._file = mmap.mmap(file.fileno(), _RECORD.size)
        self._on_gpu = torch.cuda.is_available()
        self._steps, self._seconds = 0, 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def call(self, propose: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `propose` and count it, unless it is only being captured."""
        if not self._on_gpu:
            started = time.perf_counter()
            result = propose(*args, **kwargs)
            self._add(time.perf_counter() - started)
            return result
        if torch.cuda.is_current_stream_capturing():
            return propose(*args, **kwargs)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        result = propose(*args, **kwargs)
        ended.record()
        self._running.append((began, ended))
        while self._running and self._running[0][1].query():
            began, ended = self._running.popleft()
            self._add(began.elapsed_time(ended) / 1000)
        return result

    def _add(self, seconds: float) -> None:
        self._steps += 1
        self._seconds += seconds
        _RECORD.pack_into(self._file, 0, self._steps, self._seconds)


def clocked(propose: Propose) -> Propose:
    """A proposer's `propose`, timed if the environment asks for it."""
    directory = os.environ.get(VARIABLE)
    if not directory:
        return propose
    clock: DraftClock | None = None

    @functools.wraps(propose)
    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal clock
        if clock is None:  # in the process that drafts, not in all that import this
            clock = DraftClock(Path(directory))
        return clock.call(propose, *args, **kwargs)

    return timed  # type: ignore[return-value]


def read_clocks(directory: Path) -> tuple[int, float]:
    """Draft steps and seconds so far, over all processes that draft."""
    records = [_RECORD.unpack(path.read_bytes()) for path in directory.glob(f"*{_SUFFIX}")]
    return sum(steps for steps, _ in records), sum(seconds for _, seconds in records)
