"""Let vLLM's V2 model runner run without a GPU, through Triton's interpreter.

The published Triton wheel has no CPU backend, so vLLM disables Triton on CPU and falls back to its
V1 runner. A stand-in backend named "cpu" that claims to be active makes vLLM believe in one; the
interpreter then executes every kernel in Python. It is slow, exact, and belongs to tests only.

Import and call `install()` before vLLM or torch's Triton users are imported, in every process. The
module itself is also a `sitecustomize`-style entry: see `environment()`.
"""

from __future__ import annotations

import os


def environment() -> dict[str, str]:
    """Variables that select the V2 runner and the interpreter."""
    return {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def install() -> None:
    """Put the stand-in backend in place and the variables into this process."""
    os.environ.update(environment())
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class CPUDriver(DriverBase):
        @staticmethod
        def is_active() -> bool:
            return True

        def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
            raise RuntimeError(f"the stand-in CPU backend has no {name}; kernels are interpreted")

    CPUDriver.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    backends.clear()
    backends["cpu"] = Backend(compiler=BaseBackend, driver=CPUDriver)
