"""Seconds spent drafting, from the worker that drafts to the server's /metrics page.

vLLM counts drafted and accepted tokens itself and has no place for a drafter's time: what a worker
may report to the server is a closed set of fields. So the first worker of each engine keeps two
counters in a file of Prometheus's multiprocess format, and Prometheus reads it when it asks for the
page. The file is in vLLM's own folder for such files where there is one (several API servers), else
in one that the server makes and names to its workers in the environment. No patch of vLLM.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

FOLDER = "SPECFORMER_DRAFT_TIME_DIR"
# vLLM's /metrics pages show this folder instead of what is in the server's process.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_COUNTERS = {
    "specformer:draft_seconds": "Time in the draft step: context K/V stored, slots run, drafts "
    "sampled.",
    "specformer:draft_steps": "Draft steps.",
}
# Steps whose end the GPU has not reached yet; more means that nobody asked for a long time.
_MAX_PENDING = 64

_published = False

logger = init_logger(__name__)


def publish() -> None:
    """Let this process's /metrics page show what its workers will write; once per process.

    A folder in the environment that this process did not make is another server's, which started
    this one.
    """
    global _published
    if _published or SHARED_FOLDER in os.environ:
        return
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    try:
        folder = tempfile.mkdtemp(prefix="specformer-")
    except OSError as error:
        logger.warning("SpecFormer: no draft time in /metrics (%s)", error)
        return
    os.environ[FOLDER] = folder
    _published = True
    atexit.register(_remove, folder, os.getpid())
    MultiProcessCollector(REGISTRY, folder)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits the registration
        shutil.rmtree(folder, ignore_errors=True)


class SharedCounters:
    """An engine's draft seconds and steps, in a file of its own under `folder`."""

    def __init__(self, folder: str, engine: str) -> None:
        from prometheus_client.mmap_dict import MmapedDict, mmap_key

        self._file = MmapedDict(os.path.join(folder, f"counter_specformer-{uuid.uuid4().hex}.db"))
        self._keys = [
            mmap_key(name, f"{name}_total", ["engine"], [engine], text)
            for name, text in _COUNTERS.items()
        ]
        self._totals = (0.0, 0)
        self._write()

    @classmethod
    def of_worker(cls, parallel_config: Any) -> SharedCounters | None:
        """Where a server asked for them and this is the engine's first worker."""
        folder = os.environ.get(SHARED_FOLDER) or os.environ.get(FOLDER)
        if not folder or parallel_config.rank != 0:
            return None
        try:
            # The rank is 0 in every engine of a dense target; only the index tells them apart.
            return cls(folder, str(parallel_config.data_parallel_index))
        except OSError:  # another machine than the server's, or a full disk: serving goes on
            return None

    def add(self, seconds: float, steps: int) -> None:
        self._totals = (self._totals[0] + seconds, self._totals[1] + steps)
        self._write()

    def reset(self) -> None:
        """Start again from 0."""
        self._totals = (0.0, 0)
        self._write()

    def _write(self) -> None:
        for key, total in zip(self._keys, self._totals, strict=True):
            self._file.write_value(key, total, 0.0)


class DeviceClock:
    """Times steps without waiting for the device.

    On a GPU a step is measured by two events in its stream, read in a later step when the device
    has passed them.

    Args:
        report: gets the seconds of every step and how many it counts for (0 or 1); None: nobody
            wants to know.
    """

    def __init__(self, device: torch.device, report: Callable[[float, int], None] | None) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[Any, Any, int]] = deque()
        self._report = report

    def timed(self, step: Callable[[], Any], counts: int = 1) -> Any:
        """`step()`, its time reported; `counts` 0 for the rest of a step that counts already."""
        if self._report is None:
            return step()
        if self._on_gpu:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            result = step()
            ended.record()
            self._pending.append((began, ended, counts))
            self.read_passed()
            return result
        started = time.perf_counter()
        result = step()
        self._report(time.perf_counter() - started, counts)
        return result

    def read_passed(self) -> None:
        """Report the steps that the device has finished; `timed` does it too."""
        while self._pending and self._pending[0][1].query():
            began, ended, counts = self._pending.popleft()
            if self._report is not None:
                self._report(began.elapsed_time(ended) / 1000, counts)
        if len(self._pending) > _MAX_PENDING:
            self._pending.popleft()

    def reset(self) -> None:
        """Forget the steps that are not reported yet."""
        self._pending.clear()


class DraftClock(DeviceClock):
    """The clock of a worker's draft steps, which add up on the server's /metrics page."""

    def __init__(self, device: torch.device, parallel_config: Any) -> None:
        self._counters = SharedCounters.of_worker(parallel_config)
        super().__init__(device, None if self._counters is None else self._counters.add)

    def reset(self) -> None:
        """Start again from 0, after the steps of a warm-up."""
        super().reset()
        if self._counters is not None:
            self._counters.reset()


def timed(propose: Callable[..., Any]) -> Callable[..., Any]:
    """Count a proposer's `propose` on its `clock`; dummy steps of vLLM's start are left out."""

    @functools.wraps(propose)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):
            return propose(self, *args, **kwargs)
        return self.clock.timed(functools.partial(propose, self, *args, **kwargs))

    return counted


JUDGED_DRAFTS = 4000  # drafted tokens per verdict
LOW_ACCEPTANCE = 0.05
LOW_ACCEPTANCE_CAUSES = (
    "likely causes: the head was trained for another revision or fine-tune of this target; the "
    "target is quantised or wrapped in a LoRA adapter the head never saw; the traffic (language, "
    "domain, chat template, high temperature) is unlike its training data; `specformer doctor` "
    "lists what else to check"
)


class AcceptanceMonitor:
    """Counts drafted and rejected tokens without ever waiting for the device.

    The running sum of rejections lives on the device. When a window is full it is copied to pinned
    memory asynchronously, and judged in a later step, once the copy's event has passed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._rejected = torch.zeros((), dtype=torch.int64, device=device)
        self._host = torch.zeros((), dtype=torch.int64, pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._drafted = 0
        self._judging = 0  # drafted tokens of the window being copied; 0: none

    def observe(self, drafted: int, num_rejected: Tensor) -> None:
        """Add one step: `drafted` tokens were verified, `num_rejected` [R] of them refused."""
        if drafted:
            self._rejected += num_rejected.sum()
            self._drafted += drafted
        if self._judging:
            self._judge()
        elif self._drafted >= JUDGED_DRAFTS:
            self._host.copy_(self._rejected, non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            self._judging, self._drafted = self._drafted, 0
            self._rejected.zero_()

    def reset(self) -> None:
        """Forget the steps so far, such as those of a warm-up."""
        self._rejected.zero_()
        self._drafted = self._judging = 0

    def _judge(self) -> None:
        if self._copied is not None and not self._copied.query():
            return
        accepted = 1 - int(self._host) / self._judging
        self._judging = 0
        if accepted < LOW_ACCEPTANCE:
            logger.warning(
                "SpecFormer: only %.1f%% of the last drafted tokens were accepted, so speculation "
                "costs more than it brings here. Output is not affected; %s.",
                100 * accepted,
                LOW_ACCEPTANCE_CAUSES,
            )
