"""Runs this library's Triton kernels without a GPU.

TRITON_INTERPRET would interpret every kernel of the process, other packages' included, and has to
be set before Triton is imported. Here the kernels are replaced for the length of a `with` block.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch

import specformer_kernels


def kernel_modules() -> list[ModuleType]:
    """The modules that hold kernels or launch them: `triton_*` and `launch`."""
    names = (
        module.name
        for module in pkgutil.walk_packages(specformer_kernels.__path__, "specformer_kernels.")
    )
    return [
        importlib.import_module(name)
        for name in names
        if name.rpartition(".")[2].startswith(("triton_", "launch"))
    ]


@contextmanager
def interpreted() -> Iterator[None]:
    """Interpret every kernel launched inside the block; tensors stay on the CPU."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with ExitStack() as undo:
        _widen_bfloat16_dot(undo)
        for module in kernel_modules():
            for name, member in vars(module).copy().items():
                if not isinstance(member, JITFunction):
                    continue
                # Only a kernel is launched; the other functions run inside an interpreted one.
                is_kernel = name.endswith("_kernel")
                _replace(
                    undo, module, name, InterpretedFunction(member.fn) if is_kernel else member.fn
                )
            # The interpreter adapts the builtins of the language modules it finds among the
            # kernel's globals. tl.sum and the like are compiled functions over tl.core, so they
            # need both to be called as they are written.
            _replace(undo, module, "_tl_core", tl.core)
        for name, member in vars(tl).copy().items():
            if isinstance(member, JITFunction):
                _replace(undo, tl, name, member.fn)
        yield


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside the block every new floating-point tensor of `torch.empty` holds NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with ExitStack() as undo:
        _replace(undo, torch, "empty", poisoned)
        yield


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    if before is missing:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)


def _widen_bfloat16_dot(undo: ExitStack) -> None:
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

    _replace(undo, InterpreterBuilder, "create_dot", create_dot_of_floats)
