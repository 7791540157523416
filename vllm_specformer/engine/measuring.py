"""Hold a running engine at a number of drafted tokens, and time its draft step from within.

For measuring only: nothing of it is installed when the plugin is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_PROPOSERS = {
    False: "vllm_specformer.engine.proposer_v1:SpecFormerProposer",
    True: "vllm_specformer.engine.speculator_v2:SpecFormerSpeculator",
}


def listing_schedule(counts: list[int]) -> list[list[int]]:
    """A schedule that names every count, so that an engine prepares itself for all of them."""
    return [[place, place, count] for place, count in enumerate(counts, start=1)]


def hold_drafts(llm: Any, count: int) -> None:
    """Let every step from now on draft `count` tokens, whatever its batch size.

    The engine must run in this process and have been started with a schedule. The next step still
    verifies what the last one drafted.
    """
    lookup = llm.llm_engine.engine_core.engine_core.scheduler.dynamic_sd_lookup
    lookup[:] = [count] * len(lookup)


class DraftTimer:
    """Seconds inside the proposer's `propose`, call by call; on a GPU by its own clock."""

    def __init__(self, llm: Any) -> None:
        config = llm.llm_engine.vllm_config
        module, name = _PROPOSERS[bool(getattr(config, "use_v2_model_runner", False))].split(":")
        proposer = getattr(import_module(module), name)
        self._on_gpu = torch.cuda.is_available()
        self._calls: list[Any] = []
        proposer.propose = self._timed(proposer.propose)

    def _timed(self, propose: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._on_gpu:
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                result = propose(*args, **kwargs)
                ended.record()
                self._calls.append((began, ended))
                return result
            started = time.perf_counter()
            result = propose(*args, **kwargs)
            self._calls.append(time.perf_counter() - started)
            return result

        return timed

    def take(self) -> list[float]:
        """The calls since it was last asked."""
        calls, self._calls = self._calls, []
        if not self._on_gpu:
            return calls
        torch.cuda.synchronize()
        return [began.elapsed_time(ended) / 1000 for began, ended in calls]
