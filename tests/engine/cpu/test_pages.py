"""The head's pages under vLLM's CPU attention, against the general reference on its own cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from specformer_kernels.block_attention import reference
from specformer_kernels.kv_store import rotate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_specformer.engine.cpu.pages import CpuContext, CpuPages, rotated
from vllm_specformer.engine.head_pages import HeadShape, lay_out
from vllm_specformer.head_layers import rotary_table

# RMS error over RMS of the float64 result.
ERROR_RATIO = {
    torch.float32: 2e-6,  # one rounding, 6e-8, of each of a few hundred terms, and of the exp
    torch.float16: 1e-3,  # the output is rounded once, 2**-12 in RMS; times four
    torch.bfloat16: 8e-3,  # the same: 2**-9, times four
}
SCALE = 0.25


@dataclass
class Batch:
    """Requests whose context is stored twice: in CPU pages, and as the reference wants it."""

    cache: Tensor
    pages: CpuPages
    plain: Tensor
    table: Tensor
    lens: Tensor
    counts: Tensor

    @property
    def context(self) -> CpuContext:
        return CpuContext(self.pages, self.table, self.lens, self.counts, SCALE)

    def expected(self, query: Tensor, key: Tensor, value: Tensor, sees_block: bool) -> Tensor:
        requests, rows = query.shape[:2]
        word = (1 << rows) - 1 if sees_block else 0
        out = reference.block_attention(
            *(part.double().flatten(0, 1) for part in (query, key, value)),
            self.plain,
            self.table,
            self.lens,
            torch.arange(requests + 1, dtype=torch.int32) * rows,
            torch.full((requests * rows,), word, dtype=torch.int64),
            SCALE,
            rows,
        )
        return out.view(query.shape)

    def own(self) -> Tensor:
        """Which pages belong to a request."""
        owned = torch.zeros(len(self.plain), dtype=torch.bool)
        for row, count in zip(self.table, self.counts, strict=True):
            owned[row[:count].long()] = True
        return owned


def pages_over(cache: Tensor) -> CpuPages | None:
    """As the head's layer lays its pages out in what vLLM binds."""
    _, kv_heads, _, fused_size = cache.shape
    (part,) = lay_out([cache], HeadShape(kv_heads, fused_size // 2, cache.dtype), dense=True)
    return CpuPages.over(part.key, part.value)


def make_batch(
    lens: list[int],
    counts: list[int] | None = None,
    kv_heads: int = 2,
    block_size: int = 32,
    head_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Tokens at random; pages of nobody hold NaN, and K of rows that no token has does too."""
    needed = [-(-length // block_size) for length in lens]
    counts = counts or [n + 1 for n in needed]
    width, blocks = max(counts), sum(counts) + 3
    shape = (blocks, kv_heads, block_size, 2 * head_size)
    cache = torch.full(shape, float("nan"), dtype=dtype)
    pages = pages_over(cache)
    assert pages is not None
    # Behind a request's own entries the table names pages of others.
    table = torch.randint(blocks, (len(lens), width), dtype=torch.int32)
    free = torch.randperm(blocks, dtype=torch.int32).tolist()
    plain = torch.full(shape, float("nan"), dtype=torch.float64)
    for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        pages.value[table[row, :count].long()] = 0.0
        fused = torch.randn(length, 2 * kv_heads, head_size).to(dtype)
        key, value = fused.chunk(2, dim=1)
        tokens = torch.arange(length)
        block, offset = table[row].long()[tokens // block_size], tokens % block_size
        pages.store(key, value, block * block_size + offset)
        plain[block, :, offset] = torch.cat((key, value), dim=-1).double()
    return Batch(cache, pages, plain, table, torch.tensor(lens), torch.tensor(counts))


def make_rows(batch: Batch, rows: int, heads: int, dtype: torch.dtype = torch.float32) -> Any:
    """Query, key, value [R, rows, heads or kv_heads, D] as one projection makes them."""
    kv_heads, head_size = batch.plain.shape[1], batch.plain.shape[3] // 2
    fused = torch.randn(len(batch.lens), rows, heads + 2 * kv_heads, head_size).to(dtype)
    return fused.split([heads, kv_heads, kv_heads], dim=2)


def assert_close(found: Tensor, expected: Tensor) -> None:
    error, size = (found.double() - expected).norm().item(), expected.norm().item()
    assert error <= ERROR_RATIO[found.dtype] * size, f"RMS error ratio {error / size:.3e}"


def check(batch: Batch, rows: int = 4, heads: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """A whole step: anchors, then two slot layers, whose K/V differ."""
    context = batch.context
    anchors = make_rows(batch, 1, heads, dtype)
    found = context.anchors(anchors[0].squeeze(1))
    assert_close(found.unsqueeze(1), batch.expected(*anchors, sees_block=False))
    for _ in range(2):
        slots = make_rows(batch, rows, heads, dtype)
        assert_close(context.slots(*slots, mixed=True), batch.expected(*slots, sees_block=True))


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_equals_block_attention(head_size: int, block_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(42)
    batch = make_batch([1, 130, 127, 64], None, 2, block_size, head_size, dtype)
    check(batch, dtype=dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (3, 1), (6, 2), (2, 2)])
@pytest.mark.parametrize("rows", [1, 5, 9])
def test_head_groups_and_block_widths(heads: int, kv_heads: int, rows: int) -> None:
    torch.manual_seed(42)
    check(make_batch([31, 5, 64], None, kv_heads), rows, heads)


def test_slots_without_context() -> None:
    """The paper's mask."""
    torch.manual_seed(42)
    batch = make_batch([31, 5])
    query, key, value = make_rows(batch, 4, 4)
    before = batch.cache.clone()
    found = batch.context.slots(query, key, value, mixed=False)
    batch.lens = torch.zeros_like(batch.lens)
    assert_close(found, batch.expected(query, key, value, sees_block=True))
    assert torch.equal(batch.cache.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    "counts",
    [[2, 3, 1], [1, 3, 1], [1, 2, 1]],
    ids=["some have room", "one has none", "none has, nor has the table a column for it"],
)
def test_without_a_page_for_the_slots(counts: list[int]) -> None:
    """Near the maximum length: what the table names next belongs to another request."""
    torch.manual_seed(42)
    batch = make_batch([30, 63, 32], counts)
    before, owned = batch.cache.clone(), batch.own()
    check(batch)
    after = batch.cache
    assert torch.equal(after[~owned].nan_to_num(), before[~owned].nan_to_num())
    # The requests' own tokens are what they were: the anchors see the same context again.
    anchors = make_rows(batch, 1, 4)
    found = batch.context.anchors(anchors[0].squeeze(1)).unsqueeze(1)
    assert_close(found, batch.expected(*anchors, sees_block=False))


def test_slots_are_overwritten_by_the_tokens_of_the_next_step() -> None:
    torch.manual_seed(42)
    batch = make_batch([30, 7])
    check(batch)
    accepted = 3
    _, key, value = make_rows(batch, accepted, 4)
    positions = batch.lens[:, None] + torch.arange(accepted)
    block, offset = batch.table.long().gather(1, positions // 32), positions % 32
    batch.pages.store(key.flatten(0, 1), value.flatten(0, 1), (block * 32 + offset).flatten())
    batch.plain[block, :, offset] = torch.cat((key, value), dim=-1).double()
    batch.lens = batch.lens + accepted
    check(batch)


def test_a_page_keeps_nothing_that_its_next_owner_sees() -> None:
    """A weight of 0 does not silence a NaN; what a sick request stores must not stay one."""
    torch.manual_seed(42)
    batch = make_batch([5])
    sick = torch.full((32, 2, 32), float("nan"))
    sick[1::2] = float("inf")
    batch.pages.store(sick, sick, batch.table[0, 0] * 32 + torch.arange(32))
    key, value = torch.randn(2, 5, 2, 32)
    batch.pages.store(key, value, batch.table[0, 0] * 32 + torch.arange(5))
    batch.plain[batch.table[0, 0], :, :5] = torch.cat((key, value), -1).transpose(0, 1).double()
    check(batch)


def test_negative_slots_are_skipped() -> None:
    batch = make_batch([5])
    before = batch.cache.clone()
    rows = torch.randn(4, 2, 32)
    batch.pages.store(rows, rows, torch.full((4,), -1))
    assert torch.equal(batch.cache.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("head_size", [64, 80])
def test_turns_as_the_head_does(head_size: int, dtype: torch.dtype) -> None:
    """The slots are rotated by `rotate`.

    Up to one rounding: some processors (AVX2) fuse product and sum in vLLM's operation.
    """
    torch.manual_seed(42)
    table, positions = rotary_table(500, head_size, 1e4), torch.randint(500, (9,))
    rows = torch.randn(9, 6, head_size).to(dtype)[:, 1:4]
    before = rows.clone()
    found, expected = rotated(rows, table, positions), rotate(rows, table, positions)
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(2, 2, 32, 96),  # heads of 48
        torch.zeros(2, 2, 20, 128),
        torch.zeros(2, 2, 32, 128, dtype=torch.float64),
    ],
    ids=["head size", "page size", "dtype"],
)
def test_what_the_kernels_do_not_take(cache: Tensor) -> None:
    assert pages_over(cache) is None


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


def operations_of_a_step(requests: int, has_room: bool) -> list[str]:
    lens = [33 + request % 7 if has_room else 62 + request % 2 for request in range(requests)]
    batch = make_batch(lens, [2] * requests)
    (anchor, *_), slots = make_rows(batch, 1, 4), make_rows(batch, 4, 4)
    for _ in range(2):  # the first time constants of the batch's size are made
        with Operations() as asked:
            context = batch.context
            context.anchors(anchor.squeeze(1))
            context.slots(*slots, mixed=True)
    return asked.names


@pytest.mark.parametrize("has_room", [True, False])
def test_no_loop_over_requests(has_room: bool) -> None:
    few, many = (operations_of_a_step(n, has_room) for n in (2, 64))
    assert few == many
    assert len(few) < 60
