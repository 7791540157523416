"""The V2 runner on the CPU, through Triton's interpreter: a process of its own, or nothing.

The interpreter and the stand-in backend must be in place before vLLM is imported, and then hold for
the whole process. So these tests run in the child that `test_v2_runner.py` starts, and any other
pytest run leaves the folder alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from v1.engines import DenseReference, Tokens

MARKER = "SPECFORMER_V2_TESTS"

collect_ignore_glob: list[str] = []

if os.environ.get(MARKER) == "1":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the tests look into the speculator
    os.environ["TORCHDYNAMO_DISABLE"] = (
        "1"  # small helpers would otherwise be compiled by a C++ compiler
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import triton_cpu

    triton_cpu.install()

    from .interpreter import mend

    mend()
else:
    collect_ignore_glob.append("*")


@pytest.fixture(scope="session")
def answers() -> dict[Tokens, Tokens]:
    """Greedy continuations by the target alone, on the V2 runner."""
    from .support import LONG, MAX_TOKENS, TEXTS, plain_answers

    return plain_answers([*TEXTS, *LONG], MAX_TOKENS)


@pytest.fixture(scope="session")
def reference() -> DenseReference:
    from v1.engines import DenseReference

    return DenseReference()
