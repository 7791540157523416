"""Seconds spent drafting, from the worker that drafts to the server's /metrics page.

vLLM counts drafted and accepted tokens itself and has no place for a drafter's time: what a worker
may report to the server is a closed set of fields. So the server makes a small folder, its
environment variable tells the workers, and the first worker of each engine keeps two numbers in a
file there, in shared memory. Prometheus reads them when it asks for the page. No patch of vLLM.
"""

from __future__ import annotations

import atexit
import functools
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

FOLDER = "SPECFORMER_DRAFT_TIME_DIR"
SECONDS = "specformer:draft_seconds"
STEPS = "specformer:draft_steps"
_NUMBERS = struct.Struct("dd")  # seconds, steps
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
    if _published:
        return
    from prometheus_client import REGISTRY

    try:
        folder = tempfile.mkdtemp(prefix="specformer-")
    except OSError as error:
        logger.warning("SpecFormer: no draft time in /metrics (%s)", error)
        return
    os.environ[FOLDER] = folder
    _published = True
    atexit.register(_remove, folder, os.getpid())
    REGISTRY.register(DraftTimeCollector(Path(folder)))


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits the registration
        shutil.rmtree(folder, ignore_errors=True)


class DraftTimeCollector:
    """Reads the workers' numbers whenever Prometheus asks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> list[Any]:
        """Nothing: the registry must not collect at registration."""
        return []

    def collect(self) -> Iterator[Any]:
        """Counters by engine, as vLLM labels its own."""
        from prometheus_client.core import CounterMetricFamily

        seconds = CounterMetricFamily(
            SECONDS, "Time in the draft step: context K/V stored, slots run, drafts sampled.",
            labels=["engine"],
        )  # fmt: skip
        steps = CounterMetricFamily(STEPS, "Draft steps.", labels=["engine"])
        totals: dict[str, tuple[float, float]] = {}
        for file in self._folder.glob("*"):
            content = file.read_bytes()
            if len(content) == _NUMBERS.size:
                engine = file.name.partition("-")[0]
                before = totals.get(engine, (0.0, 0.0))
                spent, count = _NUMBERS.unpack(content)
                totals[engine] = (before[0] + spent, before[1] + count)
        for engine, (spent, count) in sorted(totals.items()):
            seconds.add_metric([engine], spent)
            steps.add_metric([engine], count)
        yield seconds
        yield steps


class DraftClock:
    """Adds up the draft steps of one worker, without waiting for the device.

    On a GPU a step is measured by two events in its stream, read in a later step when the device
    has passed them.
    """

    def __init__(self, device: torch.device, parallel_config: Any) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[Any, Any]] = deque()
        self._seconds, self._steps = 0.0, 0
        self._shared = _shared_numbers(parallel_config)

    def reset(self) -> None:
        """Forget everything, as after a warm-up."""
        self._pending.clear()
        self._seconds, self._steps = 0.0, 0
        self._add(0.0, 0)

    def timed(self, step: Callable[[], Any], counts: int = 1) -> Any:
        """`step()`, its time added up; `counts` 0 for the rest of a step that counts already."""
        if self._shared is None:
            return step()
        if self._on_gpu:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            result = step()
            ended.record()
            self._pending.append((began, ended))
            self._read_passed()
            return result
        started = time.perf_counter()
        result = step()
        self._add(time.perf_counter() - started, counts)
        return result

    def _read_passed(self) -> None:
        while self._pending and self._pending[0][1].query():
            began, ended = self._pending.popleft()
            self._add(began.elapsed_time(ended) / 1000)
        if len(self._pending) > _MAX_PENDING:
            self._pending.popleft()

    def _add(self, seconds: float, steps: int = 1) -> None:
        self._seconds += seconds
        self._steps += steps
        if self._shared is not None:
            _NUMBERS.pack_into(self._shared, 0, self._seconds, self._steps)


def _shared_numbers(parallel_config: Any) -> mmap.mmap | None:
    """This engine's file, if a server asked for one and this is the engine's first worker."""
    folder = os.environ.get(FOLDER)
    if not folder or parallel_config.rank != 0:
        return None
    # The rank is 0 in every engine of a dense target; only the index tells them apart.
    engine = str(parallel_config.data_parallel_index)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{engine}-", delete=False) as file:
            file.write(_NUMBERS.pack(0, 0))
            file.flush()
            return mmap.mmap(file.fileno(), _NUMBERS.size)
    except OSError:  # another machine than the server's, or a full disk: serving goes on
        return None


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

    def reset(self) -> None:
        """Forget everything, as after a warm-up."""
        self._rejected.zero_()
        self._drafted = self._judging = 0

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

    def _judge(self) -> None:
        if self._copied is not None and not self._copied.query():
            return
        accepted = 1 - int(self._host) / self._judging
        self._judging = 0
        if accepted < LOW_ACCEPTANCE:
            logger.warning(
                "SpecFormer: only %.1f%% of the last drafted tokens were accepted, so speculation "
                "slows this server down. Output is not affected; %s.",
                100 * accepted,
                LOW_ACCEPTANCE_CAUSES,
            )
