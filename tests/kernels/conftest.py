"""Runs the Triton kernels without a GPU, and on one where there is one."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

# Where each kernel lives: module and symbol that its launcher calls.
KERNELS = {
    "specformer_kernels.block_attention.triton_kernel": "_block_attention_kernel",
    "specformer_kernels.kv_store.triton_kernel": "_kv_store_kernel",
    "specformer_kernels.grouped_rms_norm.triton_kernel": "_grouped_rms_norm_kernel",
}

RUNS = ["interpreter", "cuda"] if torch.cuda.is_available() else ["interpreter"]


@pytest.fixture(params=RUNS)
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Device to hand to a launcher; every tensor a launcher allocates starts as NaN.

    "cpu" means Triton's interpreter, put in place of the compiled kernels for this test alone.
    TRITON_INTERPRET would do it for the whole process, other packages' kernels included.
    """
    _poison_empty(monkeypatch)
    if request.param == "cuda":
        return "cuda"
    _widen_bfloat16_dot(monkeypatch)
    for module_name, kernel_name in KERNELS.items():
        _interpret(monkeypatch, importlib.import_module(module_name), kernel_name)
    return "cpu"


def _interpret(monkeypatch: pytest.MonkeyPatch, module: Any, kernel_name: str) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kernel = getattr(module, kernel_name)
    monkeypatch.setattr(module, kernel_name, InterpretedFunction(kernel.fn))
    # The interpreter adapts the builtins of the language modules it finds among the kernel's
    # globals. tl.sum and the like are compiled functions over tl.core, so they need both to be
    # called as they are written.
    monkeypatch.setitem(kernel.fn.__globals__, "_tl_core", tl.core)
    for name, member in vars(tl).copy().items():
        if isinstance(member, JITFunction):
            monkeypatch.setattr(tl, name, member.fn)


def _widen_bfloat16_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 operands as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot_of_floats(self: InterpreterBuilder, a: Any, b: Any, *args: Any) -> TensorHandle:
        return create_dot(self, widened(a), widened(b), *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot_of_floats)


def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
