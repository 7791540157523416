"""Stage a: what this machine has, and what our doctor says of it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from vllm_specformer.cli.doctor import examine

Options = dict[str, Any]


def run(options: Options) -> Options:
    """Versions, `specformer doctor`, the device."""
    report = examine(os.environ)
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": device(),
        "doctor": {"ok": report.ok, "problems": report.problems, "warnings": report.warnings},
        "versions": report.versions | {"vllm": report.vllm},
        "patches": len(report.patches),
    }


def device() -> dict[str, Any]:
    """Name, memory and CUDA version of the first GPU."""
    if not torch.cuda.is_available():
        return {"name": "CPU", "cuda": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
    }
