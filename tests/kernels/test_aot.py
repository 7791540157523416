"""Every kernel compiles ahead of time for NVIDIA and AMD GPUs, without spilling registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from specformer_kernels.block_attention import triton_kernel as block_attention
from specformer_kernels.grouped_rms_norm import triton_kernel as grouped_rms_norm
from specformer_kernels.kv_store import triton_kernel as kv_store
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Largest shared memory of one program, in bytes: A100, H100, MI300.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OPTIONS = ("num_warps", "num_stages")
INDEX_TYPES = {
    "block_table_ptr": "*i32",
    "context_lens_ptr": "*i32",
    "block_start_loc_ptr": "*i32",
    "block_mask_ptr": "*i64",
    "slot_mapping_ptr": "*i64",
    "scale_log2": "fp32",
    "eps": "fp32",
}


def compile_kernel(kernel: Any, dtype: str, target: str, constants: dict[str, int]) -> Any:
    """Compile as a launch would: 16-byte aligned pointers, strides that are multiples of 16."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    constexprs = {name: value for name, value in constants.items() if name not in OPTIONS}
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in INDEX_TYPES:
            signature[name] = INDEX_TYPES[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        elif name.endswith(("_ptrs", "_strides")):  # one of each group
            one = f"*{dtype}" if name.endswith("_ptrs") else "i32"
            signature[name] = (one,) * constexprs["NUM_GROUPS"]
        else:
            signature[name] = "i32"
    paths: list[tuple[int, ...]] = []
    for index, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            paths += [(index, element) for element in range(len(kind))]
        elif kind not in ("constexpr", "fp32"):
            paths.append((index,))
    attributes = {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(kernel, signature, constexprs, attributes)
    # Pinned: Triton 3.10 changes the default of FP fusion, and registers would move with it.
    options["enable_fp_fusion"] = True
    return triton.compile(source, target=TARGETS[target], options=options)


def assert_fits(compiled: Any, target: str, folder: Path) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    if target.startswith("gfx"):
        assert "amdgcn" in compiled.asm
        return
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(cuobjdump), "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Spilled registers live on the stack or in local memory; these kernels keep nothing else there.
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found, usage
    assert found.groups() == ("0", "0"), f"registers spill: {usage}"


@pytest.mark.parametrize(
    ("dtype", "head_size", "max_block_len", "targets"),
    [
        ("fp16", 128, 8, "sm_80 sm_90 gfx942"),
        ("bf16", 128, 8, "sm_80 sm_90 gfx942"),
        ("fp32", 128, 8, "sm_80 sm_90 gfx942"),
        ("bf16", 80, 4, "sm_80"),
        ("bf16", 128, 64, "sm_80 sm_90"),
        ("fp16", 256, 64, "sm_80"),
    ],
)
def test_block_attention(
    dtype: str, head_size: int, max_block_len: int, targets: str, tmp_path: Path
) -> None:
    constants = {"GROUP": 4, "HEAD_SIZE": head_size, "PAGE_SIZE": 16}
    tiles = block_attention.tile_sizes(max_block_len, 4, head_size, DTYPES[dtype])
    for target in targets.split():
        compiled = compile_kernel(
            block_attention._block_attention_kernel, dtype, target, constants | tiles
        )
        assert_fits(compiled, target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_store(dtype: str, target: str, tmp_path: Path) -> None:
    constants = {"HEAD_SIZE": 128, "PAGE_SIZE": 16} | kv_store.tile_sizes(32, 128)
    compiled = compile_kernel(kv_store._kv_store_kernel, dtype, target, constants)
    assert_fits(compiled, target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_rms_norm(dtype: str, target: str, tmp_path: Path) -> None:
    hidden_size = 5120
    constants = {"NUM_GROUPS": 4, "HIDDEN_SIZE": hidden_size}
    constants |= grouped_rms_norm.tile_sizes(hidden_size)
    compiled = compile_kernel(grouped_rms_norm._grouped_rms_norm_kernel, dtype, target, constants)
    assert_fits(compiled, target, tmp_path)


def test_grouped_rms_norm_of_the_largest_row(tmp_path: Path) -> None:
    hidden_size = grouped_rms_norm.MAX_HIDDEN_SIZE
    constants = {"NUM_GROUPS": 4, "HIDDEN_SIZE": hidden_size}
    constants |= grouped_rms_norm.tile_sizes(hidden_size)
    compiled = compile_kernel(grouped_rms_norm._grouped_rms_norm_kernel, "bf16", "sm_80", constants)
    assert_fits(compiled, "sm_80", tmp_path)
