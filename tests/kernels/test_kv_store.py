"""Storing K and V: the kernel writes what the reference writes, bit for bit, and nothing else."""

from __future__ import annotations

import pytest
import torch
from specformer_kernels.kv_store import reference, triton_kernel
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_BLOCKS, BLOCK_SIZE = 5, 16


def make_rows(
    num_rows: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K and V as views of one projection, with strides of their own."""
    fused = torch.randn(num_rows, 3 * num_kv_heads, head_size).to(dtype)
    return fused[:, :num_kv_heads], fused[:, -num_kv_heads:]


def make_cache(num_kv_heads: int, head_size: int, dtype: torch.dtype, layout: str) -> Tensor:
    shape = (NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, 2 * head_size)
    if layout == "heads_first":
        return torch.randn(shape).to(dtype)
    if layout == "tokens_first":
        return torch.randn(shape).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return torch.randn(NUM_BLOCKS, 3, *shape[1:]).to(dtype)[:, 1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(42)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["heads_first", "tokens_first", "shared"])
@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(2, 64), (1, 80), (3, 96), (40, 128)])
def test_matches_reference(
    num_kv_heads: int, head_size: int, layout: str, dtype: torch.dtype, kernel_device: str
) -> None:
    key, value = make_rows(6, num_kv_heads, head_size, dtype)
    cache = make_cache(num_kv_heads, head_size, dtype, layout).to(kernel_device)
    expected = cache.clone()
    slots = torch.tensor([79, -1, 0, 33, -1, 16])
    reference.kv_store(
        key.to(kernel_device), value.to(kernel_device), expected, slots.to(cache.device)
    )
    triton_kernel.kv_store(
        key.to(kernel_device), value.to(kernel_device), cache, slots.to(cache.device)
    )
    assert torch.equal(cache, expected)


def test_reference_matches_the_definition() -> None:
    key, value = make_rows(3, 2, 8, torch.float32)
    cache = make_cache(2, 8, torch.float32, "tokens_first")
    expected = cache.clone()
    for row, slot in ((0, 18), (2, 1)):
        expected[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = torch.cat((key[row], value[row]), -1)
    reference.kv_store(key, value, cache, torch.tensor([18, -1, 1]))
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("slots", [[], [-1, -1]], ids=["no_rows", "all_skipped"])
def test_writes_nothing(slots: list[int], kernel_device: str) -> None:
    key, value = make_rows(len(slots), 2, 64, torch.float32)
    cache = make_cache(2, 64, torch.float32, "heads_first")
    before, mapping = cache.clone(), torch.tensor(slots, dtype=torch.int64)
    reference.kv_store(key, value, cache, mapping)
    assert torch.equal(cache, before)
    moved = cache.to(kernel_device)
    triton_kernel.kv_store(
        key.to(kernel_device), value.to(kernel_device), moved, mapping.to(kernel_device)
    )
    assert torch.equal(moved.cpu(), before)


@pytest.mark.parametrize("implementation", [reference, triton_kernel], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", lambda tensor: tensor[0]),
        ("value", lambda tensor: tensor[:1]),
        ("value", lambda tensor: tensor.half()),
        ("kv_cache", lambda tensor: tensor[:, :1]),
        ("kv_cache", lambda tensor: tensor[..., :64]),
        ("kv_cache", lambda tensor: tensor.mT.contiguous().mT),
        ("slot_mapping", lambda tensor: tensor[:1]),
        ("slot_mapping", lambda tensor: tensor.int()),
    ],
)
def test_refuses_arguments(name: str, change, implementation) -> None:
    key, value = make_rows(3, 2, 64, torch.float32)
    arguments = {
        "key": key,
        "value": value,
        "kv_cache": make_cache(2, 64, torch.float32, "heads_first"),
        "slot_mapping": torch.tensor([0, 1, 2]),
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation.kv_store(**arguments)
