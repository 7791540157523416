"""Runs the Triton kernels without a GPU, and on one where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from specformer_kernels import interpreter

RUNS = ["interpreter", "cuda"] if torch.cuda.is_available() else ["interpreter"]


@pytest.fixture(params=RUNS)
def kernel_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Device to hand to a launcher; every tensor a launcher allocates starts as NaN.

    "cpu" means Triton's interpreter, put in place of the compiled kernels for this test alone.
    """
    on_gpu = request.param == "cuda"
    with interpreter.poisoned_empty(), nullcontext() if on_gpu else interpreter.interpreted():
        yield "cuda" if on_gpu else "cpu"
