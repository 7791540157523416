"""Stage a: what this machine has, and whether vLLM starts with our plugin in it."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from gpu_stages import pair
from gpu_stages.draft_clock import QUALIFIED_NAME
from vllm_specformer.cli.doctor import examine

Options = dict[str, Any]
DRAFTER = "SpecFormerSpeculator"


def run(options: Options) -> Options:
    """Versions, `specformer doctor`, and a first answer of the bundled pair.

    Raises:
        RuntimeError: vLLM runs, but drafts with another class than ours.
    """
    report = examine(os.environ)
    started = time.perf_counter()
    llm = pair.start({"speculative": pair.speculative(), **options}, QUALIFIED_NAME)
    seconds = time.perf_counter() - started
    answer = llm.generate(pair.prompts(1), pair.greedy(8), use_tqdm=False)[0].outputs[0].text
    found = llm.collective_rpc("describe_drafter")[0]
    if found["drafter"] != DRAFTER:
        raise RuntimeError(
            f"vLLM drafts with {found['drafter']} instead of {DRAFTER}: the plugin is not in "
            "place; `specformer doctor` says why"
        )
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": device(),
        "doctor": {"ok": report.ok, "problems": report.problems, "warnings": report.warnings},
        "versions": report.versions | {"vllm": report.vllm},
        "patches": len(report.patches),
        "start_seconds": seconds,
        "answer": answer,
        **found,
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
