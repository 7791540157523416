"""What a subcommand imports beyond vLLM's own dependencies, asked for before it does any work."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from vllm_specformer.errors import SpecFormerError

# Subcommand -> (this package's extra, what the subcommand imports of it).
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "distill": ("train", ("pyarrow",)),
    "train": ("train", ("accelerate", "matplotlib", "pyarrow")),
    "eval": ("train", ("pyarrow",)),
    "bench": ("bench", ("matplotlib",)),
    "plan": ("bench", ()),
}


def check_extras(options: argparse.Namespace) -> None:
    """Find what the subcommand and its `--plot` need.

    Raises:
        SpecFormerError: something is not installed; names it and the extra that brings it.
    """
    extra, modules = NEEDS.get(options.command, ("", ()))
    if getattr(options, "plot", None) is not None:
        modules += ("matplotlib",)
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        raise SpecFormerError(
            f"{', '.join(absent)}: not installed, and this command needs it. Run "
            f"pip install '.[{extra}]' in a clone of vllm-specformer"
        )
