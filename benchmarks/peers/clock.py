"""A training's clock that counts the process's cpu-seconds, without those that do not count."""

from __future__ import annotations

import time

from peers.target_states import Aside
from vllm_specformer.training.pace import Clock


class CpuClock(Clock):
    """`specformer train` follows it as it follows the one on the wall."""

    def __init__(self, limit: float | None, aside: Aside) -> None:
        super().__init__(limit)
        self.aside = aside
        self._since = self._now()

    def _now(self) -> float:
        return time.process_time() - self.aside.seconds

    def start(self, before: float, evaluated: float) -> None:
        super().start(before, evaluated)
        self._since = self._now()

    @property
    def seconds(self) -> float:
        return self._before + self._now() - self._since

    def advance(self) -> float:
        """As its base class, for a training that evaluates nothing."""
        assert self.limit is not None
        self.reached = self.seconds / self.limit
        return self.reached
