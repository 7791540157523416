"""Calls of each op at the sizes that matter, to compile and to time; one module per op.

A module has `aot_calls(dtype)`, for benchmarks/kernels_aot.py, and `bench_cases(device, dtype,
quick)`, for benchmarks/kernels.py. On "cpu" the latter yields toy sizes for the interpreter.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Alternative:
    """What a user would take instead of the kernel."""

    call: Callable[..., Any]
    # Turns the case's inputs into those of `call`; not timed.
    prepare: Callable[..., tuple[Any, ...]] | None = None
    # Whether it returns what the kernel returns. Another sampler's draws differ.
    is_comparable: bool = True
    is_compiled: bool = False


def compiled(function: Callable[..., Any]) -> Alternative:
    """What torch.compile makes of `function`, for these shapes alone; no graph breaks."""

    @functools.cache
    def build() -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False)

    return Alternative(lambda *arguments: build()(*arguments), is_compiled=True)


@dataclass(frozen=True)
class BenchCase:
    """One op at one size."""

    name: str
    inputs: Callable[[], tuple[Any, ...]]  # fresh random arguments, on the device
    kernel: Callable[..., Any]  # the launcher
    reference: Callable[..., Any]
    least_bytes: int  # that any implementation has to move through device memory
    launches: int
    tolerance: float  # bound on `kernel_timing.error_of`; 0 asks for equality
    aim: float | None = None  # share of the copy bandwidth
    # A reason in place of an alternative says why there is none.
    alternatives: Mapping[str, Alternative | str] = field(default_factory=dict)


def rounding(dtype: torch.dtype) -> float:
    """Relative RMS error of a result rounded once to `dtype`.

    Sums in float32 that are taken in another order differ by less than 1e-5.
    """
    return max(torch.finfo(dtype).eps, 1e-5)


def modules() -> dict[str, ModuleType]:
    """The modules of this folder by the name of their op."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
