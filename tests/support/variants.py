"""Which of a Triton kernel's compiled variants a launch asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction, create_function_from_signature


@cache
def _binder(kernel: Any) -> Any:
    if not isinstance(kernel, JITFunction):  # of Triton's interpreter, which compiles nothing
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    return create_function_from_signature(kernel.signature, kernel.params, BaseBackend)


def variant(kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What Triton looks the compiled kernel up by."""
    _, specialization, options = _binder(kernel)(*args, **kwargs)
    return f"{kernel.__name__} {specialization} {options}"
