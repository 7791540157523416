"""The environment of engines inside a test process; to be set before anything imports vLLM."""

from __future__ import annotations

import os


def prepare_engines() -> None:
    """Engines in this process, because the tests look into proposer and speculator.

    One thread, because a toy model gains nothing from more and loses a lot when another process
    shares the cores.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def prepare_interpreted_engines() -> None:
    """The same on the V2 runner, through Triton's interpreter, for the rest of the process."""
    from support.v2 import triton_cpu
    from support.v2.interpreter import mend

    prepare_engines()
    # Small helpers would otherwise be compiled by a C++ compiler.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    triton_cpu.install()
    mend()
