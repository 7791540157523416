"""How much memory an engine takes on a CPU.

vLLM reserves 92% of a device's memory. Of a machine's memory so much is hardly ever free, and vLLM
then refuses to start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHARE = 0.7  # of the memory that is free when the engine starts
_ARGUMENT = "gpu_memory_utilization"  # on a CPU too
_DECIDES = (_ARGUMENT, "kv_cache_memory_bytes")


def fitting_utilization() -> float | None:
    """What vLLM may be told to reserve, as a share of all memory; None: it does not run on a CPU.

    Rounded down to a hundredth.
    """
    import psutil
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    memory = psutil.virtual_memory()
    return int(100 * SHARE * memory.available / memory.total) / 100


def with_memory(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, with what fits where they leave the memory to vLLM."""
    if any(arguments.get(name) is not None for name in _DECIDES):
        return dict(arguments)
    share = fitting_utilization()
    return dict(arguments) if share is None else {**arguments, _ARGUMENT: share}


def memory_options(options: Sequence[str]) -> list[str]:
    """The same for options of `vllm serve`: what to append to them.

    Nothing where a file of options (`--config`) may decide, or help is asked for.
    """
    names = {option.partition("=")[0].lstrip("-").replace("-", "_") for option in options}
    if names & {*_DECIDES, "config", "help", "h"}:
        return []
    share = fitting_utilization()
    return [] if share is None else [f"--{_ARGUMENT.replace('_', '-')}", f"{share:g}"]
