"""How much memory an engine takes on a CPU.

vLLM reserves 92% of a device's memory. So much of a machine's memory is hardly ever free, and vLLM
then refuses to start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHARE = 0.4  # of the free memory, so that a second engine finds room, too
_ARGUMENT = "gpu_memory_utilization"  # on a CPU too
_DECIDES = (_ARGUMENT, "device_memory_utilization", "kv_cache_memory_bytes")
_GROUP = Path("/sys/fs/cgroup")


def fitting_utilization() -> float | None:
    """What vLLM may be told to reserve, as a share of all memory, in hundredths.

    None: vLLM does not run on a CPU, or its own variable decides.
    """
    import psutil
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    memory = psutil.virtual_memory()
    free = min(memory.available, left_in_group(_GROUP))
    return max(1, int(100 * SHARE * free / memory.total)) / 100


def left_in_group(group: Path) -> float:
    """Bytes that a container may still take (control groups, version 2); infinite without limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = (group / "memory.current").read_text().strip()
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else max(0.0, float(limit) - float(used))


def with_memory(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, with what fits where they leave the memory to vLLM."""
    if any(arguments.get(name) is not None for name in _DECIDES):
        return dict(arguments)
    share = fitting_utilization()
    return dict(arguments) if share is None else {**arguments, _ARGUMENT: share}


def memory_options(options: Sequence[str]) -> list[str]:
    """The same for options of `vllm serve`, to be put before the user's own, which then win.

    Nothing where they decide, a file of options (`--config`) may, or help is asked for.
    """
    names = {option.partition("=")[0].lstrip("-").replace("-", "_") for option in options}
    if names & {*_DECIDES, "config", "help", "h"}:
        return []
    share = fitting_utilization()
    return [] if share is None else [f"--{_ARGUMENT.replace('_', '-')}", f"{share:g}"]
