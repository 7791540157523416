"""The dry form's runtime: vLLM's V2 runner on a CPU, through Triton's interpreter.

It is the tests' support for that, from their folder. Nothing of it means anything for speed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests" / "engine"


def prepare() -> None:
    """Put interpreter and stand-in backend in place; before vLLM is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        TORCHDYNAMO_DISABLE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1",
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(TESTS))
    import triton_cpu

    triton_cpu.install()
    from v2.interpreter import mend

    mend()
