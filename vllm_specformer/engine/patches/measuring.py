"""Hold a running engine at a number of drafted tokens.

For measuring only: nothing of it is installed when the plugin is loaded.
"""

from __future__ import annotations

from typing import Any


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
