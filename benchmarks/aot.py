"""Compiles kernels for GPUs that are not at hand, and reads off what they use.

A launcher is called with ordinary CPU tensors while launches are recorded instead of run. From the
recorded arguments follows the signature that a real launch would compile for: pointer types,
integers equal to 1 folded in, divisibility by 16. So a kernel is compiled with the tile sizes its
launcher really chooses, and nothing about its parameters is written down twice.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Largest shared memory of one program, in bytes: A100, H100, B200, MI300.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def kernel_name(kernel: JITFunction) -> str:
    """Op folder and name of a kernel of the library."""
    op = kernel.fn.__module__.split(".")[-2]
    return f"{op}.{kernel.fn.__name__.strip('_')}"


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of one launch of it."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Op and kernel, such as `kv_store.kv_store_kernel`."""
        return kernel_name(self.kernel)

    @property
    def tiles(self) -> str:
        """The constants it is compiled for, as in "BLOCK_D=128 GROUP=4"."""
        names = (p.name for p in self.kernel.params if p.is_constexpr)
        return " ".join(f"{n}={self.kwargs[n]}" for n in sorted(names) if n in self.kwargs)


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel, registers and spill per thread."""

    registers: int
    shared_bytes: int
    spill_bytes: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the kernel launches inside the block; none of them runs."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """The launches `call` makes; its own result is meaningless and dropped."""
    with recorded() as launches:
        call()
    return launches


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile as the launch would on a GPU of `target`.

    Triton's own rules decide what is folded in. Those of AMD's backend that hold for tensors below
    2 GB only are left out: a cache is larger.
    """
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    # Pinned: Triton 3.10 changes the default of FP fusion, and registers would move with it.
    kwargs = launch.kwargs | {"enable_fp_fusion": True}
    if target.startswith("gfx"):
        kwargs.pop("maxnreg", None)  # NVIDIA's alone: a launcher leaves it out on ROCm
    bind = create_function_from_signature(kernel.signature, kernel.params, BaseBackend)
    bound, specialization, extra = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, extra
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options.__dict__)


def usage(compiled: Any, target: str) -> Usage:
    """Registers, shared memory and spills of a compiled kernel."""
    if target.startswith("gfx"):
        return _amd_usage(compiled)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(cuobjdump), "-res-usage", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", report)
    assert found, report
    # Spilled registers live on the stack or in local memory; our kernels keep nothing else there.
    registers, stack, local = map(int, found.groups())
    return Usage(registers, int(compiled.metadata.shared), stack + local)


def _amd_usage(compiled: Any) -> Usage:
    text = compiled.asm["amdgcn"]

    def read(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", text)
        assert found, field
        return int(found.group(1))

    return Usage(read("vgpr_count"), int(compiled.metadata.shared), 4 * read("vgpr_spill_count"))
