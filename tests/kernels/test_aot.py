"""Every kernel compiles ahead of time for NVIDIA and AMD GPUs, without spilling registers.

The cases are those of `benchmarks/kernel_cases`; `benchmarks/kernels_aot.py` writes what all of
them use to a table. Here a part of them is compiled again and the table is held against it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

import aot
import kernel_cases
import kernels_aot
import pytest
import specformer_kernels
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

REPAIR = "run `python benchmarks/kernels_aot.py`"


def kernels() -> dict[str, str]:
    """Op folder of every kernel of the library, by the kernel's name."""
    found = {}
    for module in pkgutil.walk_packages(specformer_kernels.__path__, "specformer_kernels."):
        _, op, *rest = module.name.split(".")
        if rest and rest[-1].startswith("triton_"):
            members = vars(importlib.import_module(module.name)).items()
            found |= {
                aot.kernel_name(member): op
                for name, member in members
                if name.endswith("_kernel") and isinstance(member, JITFunction)
            }
    return found


@functools.cache
def all_jobs() -> list[kernels_aot.Job]:
    return list(kernels_aot.jobs())


@functools.cache
def table() -> dict[tuple[str, ...], kernels_aot.Row]:
    rows = kernels_aot.read() if kernels_aot.RESULT.exists() else []
    return {row.key: row for row in rows}


def test_every_op_has_cases() -> None:
    assert set(kernels().values()) <= set(kernel_cases.modules())


def test_every_kernel_has_a_case() -> None:
    assert {job.key[0] for job in all_jobs()} == set(kernels())


def part_of(op: str, dtype: str) -> list[kernels_aot.Job]:
    """One architecture of each kernel and case, in turn: all twelve combinations take minutes."""
    archs, shift = list(aot.TARGETS), list(aot.DTYPES).index(dtype)
    return [
        job
        for index, job in enumerate(kernels_aot.jobs([op], [dtype], archs))
        if archs.index(job.arch) == (index // len(archs) + shift) % len(archs)
    ]


@pytest.mark.parametrize("dtype", aot.DTYPES)
@pytest.mark.parametrize("op", kernel_cases.modules())
def test_compiles_without_spills(op: str, dtype: str) -> None:
    jobs = part_of(op, dtype)
    assert jobs
    for job in jobs:
        row = job.compile()
        assert not list(row.problems())
        recorded = table().get(row.key)
        if recorded and recorded.triton == triton.__version__:
            assert row == recorded, REPAIR


def test_the_table_is_complete() -> None:
    assert set(table()) == {job.key for job in all_jobs()}, REPAIR
    assert {dtype for _, dtype, *_ in table()} == set(aot.DTYPES)
    assert {arch for _, _, arch, *_ in table()} == set(aot.TARGETS)


def test_the_table_reports_no_problem() -> None:
    assert not [problem for row in table().values() for problem in row.problems()]


def test_problems_are_found() -> None:
    good = kernels_aot.Row("k", "bf16", "sm_80", 255, 163 * 1024, 0, "c", "", 4, 2, "3.9.0")
    assert not list(good.problems())
    spilled = kernels_aot.Row("k", "bf16", "sm_80", 255, 0, 8, "c", "", 4, 2, "3.9.0")
    assert len(list(spilled.problems())) == 1
    large = kernels_aot.Row("k", "bf16", "gfx942", 255, 64 * 1024 + 1, 8, "c", "", 4, 2, "3.9.0")
    assert len(list(large.problems())) == 1


@triton.jit
def _hoarding_kernel(x_ptr, SIZE: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, SIZE)
    values = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, values / tl.sum(values, 0))


def test_a_spill_is_measured() -> None:
    """512 values a thread, all alive until their sum is known."""
    x = torch.zeros(65536)
    (launch,) = aot.launches_of(lambda: _hoarding_kernel[(1,)](x, SIZE=65536, num_warps=4))
    usage = aot.usage(aot.compile_launch(launch, "sm_80"), "sm_80")
    assert usage.spill_bytes > 0
