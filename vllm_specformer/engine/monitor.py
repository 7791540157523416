"""Warn when a head's drafts are almost never accepted: it is lossless, but it only costs time."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.logger import init_logger

logger = init_logger(__name__)

WINDOW = 4000  # drafted tokens per verdict
THRESHOLD = 0.05
CAUSES = (
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
        elif self._drafted >= WINDOW:
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
        if accepted < THRESHOLD:
            logger.warning(
                "SpecFormer: only %.1f%% of the last drafted tokens were accepted, so speculation "
                "slows this server down. Output is not affected; %s.",
                100 * accepted,
                CAUSES,
            )
