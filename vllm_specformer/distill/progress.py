"""How far a run has come: a bar with the time that is left and the speed."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LOG_LINES = 30.0


class ProgressBar:
    """Counts answers on a bar and tokens beside it; speeds are those of this run from its start.

    Args:
        total: answers of the whole run.
        done: those of earlier runs.
    """

    def __init__(self, total: int, done: int) -> None:
        terminal = sys.stderr.isatty()
        self.tokens = 0
        self._started = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="distilling",
            unit=" answers",
            dynamic_ncols=True,
            smoothing=0,  # speed and time left by the whole run: answers come in waves
            mininterval=0.2 if terminal else _SECONDS_BETWEEN_LOG_LINES,
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def speed(self) -> str:
        return f"{self.tokens / max(self.seconds, 1e-6):,.0f} tokens/s"

    def answered(self, answers: int, tokens: int) -> None:
        """So many more answers and tokens."""
        self.tokens += tokens
        self._bar.set_postfix_str(self.speed, refresh=False)
        self._bar.update(answers)

    def close(self) -> None:
        self._bar.close()
