"""The CPU's gathered context against the general reference, and what its calls cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specformer_kernels.block_attention import gathered, reference
from specformer_kernels.block_attention.gathered import GatheredContext
from specformer_kernels.kv_store import kv_store
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# RMS error over RMS of the float64 result.
ERROR_RATIO = {
    torch.float64: 1e-12,  # only the order of summation differs
    torch.float32: 1e-6,  # one rounding, 6e-8, of each of a few hundred terms
    torch.float16: 1e-3,  # weights and output are rounded once each, 2**-12 in RMS; times four
    torch.bfloat16: 2e-2,  # so are the scores, of at most 8 in size: 2**-7 at most
}


def make_cache(
    blocks: int, kv_heads: int, block_size: int, head_size: int, layout: str, dtype: torch.dtype
) -> Tensor:
    """Pages filled with NaN: unowned rows must not leak."""

    def full(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    size = 2 * head_size
    if layout == "heads_first":
        return full(blocks, kv_heads, block_size, size)
    if layout == "tokens_first":
        return full(blocks, block_size, kv_heads, size).transpose(1, 2)
    # Behind another layer's, each row padded.
    return full(blocks, 2, kv_heads, block_size, size + 3)[:, 1, :, :, :size]


def make_context(
    lens: list[int],
    kv_heads: int = 2,
    block_size: int = 16,
    head_size: int = 16,
    layout: str = "shared",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages with the tokens of every request, their table and lengths."""
    per_request = max(1, -(-max(lens) // block_size))
    pages = len(lens) * per_request
    cache = make_cache(pages + 1, kv_heads, block_size, head_size, layout, dtype)
    table = (torch.randperm(pages) + 1).view(len(lens), per_request).int()
    for request, length in enumerate(lens):
        for start in range(0, length, block_size):
            filled = min(block_size, length - start)
            page = cache[table[request, start // block_size], :, :filled]
            page.copy_(torch.randn(page.shape))
        table[request, -(-length // block_size) :] = 10**6  # junk
    return cache, table, torch.tensor(lens)


def make_rows(
    requests: int, rows: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> list[Tensor]:
    fused = torch.randn(requests, rows, heads + 2 * kv_heads, head_size).to(dtype)
    return list(fused.split([heads, kv_heads, kv_heads], dim=2))


def from_reference(
    rows: list[Tensor], cache: Tensor, table: Tensor, lens: Tensor, sees_block: bool
) -> Tensor:
    query, key, value = (part.double().flatten(0, 1) for part in rows)
    requests, count = rows[0].shape[:2]
    word = (1 << count) - 1 if sees_block else 0
    out = reference.block_attention(
        query,
        key,
        value,
        cache.double(),
        table,
        lens,
        torch.arange(requests + 1, dtype=torch.int32) * count,
        torch.full((requests * count,), word, dtype=torch.int64),
        0.25,
        count,
    )
    return out.view(rows[0].shape)


def assert_close(found: Tensor, expected: Tensor) -> None:
    error, size = (found.double() - expected).norm().item(), expected.norm().item()
    assert error <= ERROR_RATIO[found.dtype] * size, f"RMS error ratio {error / size:.3e}"


def check(
    rows: list[Tensor], cache: Tensor, table: Tensor, lens: Tensor, is_alone: bool = True
) -> None:
    before = cache.clone()
    context = GatheredContext(cache, table, lens, room=rows[0].shape[1])
    if is_alone:
        alone = context.attend(rows[0], 0.25)
        assert_close(alone, from_reference(rows, cache, table, lens, sees_block=False))
    context.append(rows[2], rows[1])
    context.append(rows[1], rows[2])  # a second slot layer's take the place of the first one's
    both = context.attend(rows[0], 0.25)
    assert_close(both, from_reference(rows, cache, table, lens, sees_block=True))
    assert torch.equal(cache.nan_to_num(), before.nan_to_num()), "the pages were written to"


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("lens", [[1], [63, 1, 17], [48, 16, 96]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("rows", [1, 5])
def test_equals_block_attention(
    block_size: int, lens: list[int], heads: int, kv_heads: int, rows: int
) -> None:
    torch.manual_seed(42)
    context = make_context(lens, kv_heads, block_size)
    check(make_rows(len(lens), rows, heads, kv_heads, 16, torch.float64), *context)


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("layout", ["heads_first", "tokens_first", "shared"])
@pytest.mark.parametrize("head_size", [64, 80])
def test_layouts_and_dtypes(head_size: int, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(42)
    context = make_context([130, 7], 2, 32, head_size, layout, dtype)
    check(make_rows(2, 3, 4, 2, head_size, dtype), *context)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_empty_contexts(dtype: torch.dtype) -> None:
    """Alone such a request sees nothing; with its block it does."""
    torch.manual_seed(42)
    context = make_context([0, 20, 0], dtype=dtype)
    check(make_rows(3, 2, 4, 2, 16, dtype), *context, is_alone=False)


def test_memory_is_used_again_but_never_shared() -> None:
    cache, table, lens = make_context([40, 3])
    with torch.inference_mode():  # which must not stick to the memory
        address = GatheredContext(cache, table, lens, room=1).key.data_ptr()
    first = GatheredContext(cache, table, lens, room=1)
    assert first.key.data_ptr() == address
    held = first.key.clone(), first.value.clone()
    second = GatheredContext(cache * 2, table, lens, room=1)
    assert torch.equal(first.key, held[0])
    assert torch.equal(first.value, held[1])
    first.append(*torch.ones(2, 2, 1, 2, 16, dtype=torch.float64))
    del first, second
    assert len(gathered._spare) == 1


class Operations(TorchDispatchMode):
    """Names the operations PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations_of_a_step(requests: int, dtype: torch.dtype, is_ragged: bool) -> list[str]:
    """What storing, gathering and both attentions of a step ask for, then the reference."""
    torch.manual_seed(42)
    lens = [40 - request % 7 * is_ragged for request in range(requests)]
    cache, table, lengths = make_context(lens, dtype=dtype, layout="heads_first")
    query, key, value = make_rows(requests, 3, 4, 2, 16, dtype)
    slots = torch.arange(requests * 3)
    starts = torch.arange(requests + 1, dtype=torch.int32) * 3
    words = torch.full((requests * 3,), 7, dtype=torch.int64)
    rows = [part.flatten(0, 1) for part in (query, key, value)]
    with Operations() as asked:
        kv_store(rows[1], rows[2], cache, slots)
        context = GatheredContext(cache, table, lengths, room=3)
        context.attend(query[:, :1], 0.25)
        context.append(key, value)
        context.attend(query, 0.25)
        for longest in (3, 4):  # uniform blocks and the way for uneven ones
            reference.block_attention(*rows, cache, table, lengths, starts, words, 0.25, longest)
    return asked.names


@pytest.mark.parametrize("is_ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_loop_over_requests(dtype: torch.dtype, is_ragged: bool) -> None:
    one, few, many = (operations_of_a_step(n, dtype, is_ragged) for n in (1, 8, 64))
    assert few == many
    # One request saves the copies of a dimension of size 1, and takes the fused attention.
    assert len(one) <= len(many) < 400
