"""Calls of block_attention: draft slots and verification trees, 8 K/V and 32 query heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from specformer_kernels.block_attention import launch, reference
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kernel_cases import Alternative, BenchCase, compiled, rounding

NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, NUM_SLOTS = 32, 8, 16, 8
H200_MULTIPROCESSORS = 132
FULL_BLOCK = reference.MAX_BLOCK_LEN
# Aimed at where bytes, not launches, take the time.
AIM, AIM_TOKENS = 0.80, 131_072
WINDOW = (2048, 4)  # tokens, and sinks


@dataclass(frozen=True)
class Shape:
    """A batch of requests with blocks of equal length."""

    context_lens: Sequence[int]
    num_rows: int = NUM_SLOTS
    head_size: int = 128
    num_heads: int = NUM_HEADS
    num_kv_heads: int = NUM_KV_HEADS

    @property
    def least_bytes(self) -> int:
        """Elements of the context's and the block's K/V, the queries and the result."""
        requests = len(self.context_lens)
        tokens = sum(self.context_lens) + requests * self.num_rows
        kv = 2 * tokens * self.num_kv_heads
        return (kv + 2 * requests * self.num_rows * self.num_heads) * self.head_size


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for head_size, num_rows in ((64, 8), (128, 8), (256, 8), (128, FULL_BLOCK)):
        shape = Shape((8192, 8192), num_rows, head_size)
        name = f"{num_rows} rows, head size {head_size}"
        yield name, _call(shape, dtype)
    short = Shape((launch.MIN_SPLIT_TOKENS, 16))
    yield f"{NUM_SLOTS} rows, head size 128, unsplit", _call(short, dtype)
    long, (window, sinks) = Shape((8192, 8192)), WINDOW
    name = f"{NUM_SLOTS} rows, head size 128, window of {window}"
    yield name, _call(long, dtype, window=window, sinks=sinks)


def _call(shape: Shape, dtype: torch.dtype, **window: int) -> Callable[[], object]:
    arguments = _inputs(shape, dtype, "cpu", draw=torch.zeros)
    return partial(_with_multiprocessors, H200_MULTIPROCESSORS, *arguments, **window)


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Draft slots at contexts of 1k and 8k; a very long one, alone and among short ones; a tree."""
    cases = {
        f"{requests} x {tokens} tokens": Shape([tokens] * requests)
        for tokens in (1024, 8192)
        for requests in (1, 16, 64, 128)
    }
    cases["1 x 131072 tokens"] = Shape([131_072])
    cases["31 x 1024, 1 x 131072 tokens"] = Shape([1024] * 31 + [131_072])
    cases["16 x 8192 tokens, trees of 64 rows"] = Shape([8192] * 16, FULL_BLOCK)
    kernel: Callable[..., torch.Tensor] = launch.block_attention
    if device == "cpu":
        small = {"num_heads": 2, "num_kv_heads": 1, "head_size": 16}
        cases = {"3 + 530 tokens": Shape([3, 530], 2, **small)}
        kernel = partial(_with_multiprocessors, 4)
    elif quick:
        cases = {name: cases[name] for name in ("64 x 1024 tokens", "16 x 8192 tokens")}
    for name, shape in cases.items():
        yield BenchCase(
            name=name,
            inputs=partial(_inputs, shape, dtype, device),
            kernel=kernel,
            reference=reference.block_attention,
            least_bytes=shape.least_bytes * dtype.itemsize,
            launches=2,
            # Weights and result are rounded.
            tolerance=2 * rounding(dtype),
            aim=AIM if sum(shape.context_lens) >= AIM_TOKENS else None,
            alternatives={
                "torch.compile": compiled(reference.block_attention),
                "gather, SDPA": Alternative(_gathered_sdpa),
                "SDPA alone": Alternative(_sdpa, _gather),
                "FlexAttention alone": replace(compiled(_flex), prepare=_gather_for_flex),
            },
        )


def _with_multiprocessors(count: int, *arguments: Any, **window: int) -> torch.Tensor:
    """Launch as on a GPU of `count` multiprocessors: their number decides how much is split."""
    with mock.patch.object(launch, "multiprocessors", return_value=count):
        return launch.block_attention(*arguments, **window)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: str, draw: Callable[..., torch.Tensor] = torch.randn
) -> tuple[Any, ...]:
    requests, rows, size = len(shape.context_lens), shape.num_rows, shape.head_size
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    fused = draw(requests * rows, sum(heads), size, dtype=dtype, device=device)
    needed = [-(-length // BLOCK_SIZE) for length in shape.context_lens]
    table = torch.zeros(requests, max(needed), dtype=torch.int32)
    order = torch.randperm(sum(needed), dtype=torch.int32).split(needed)
    for row, pages in zip(table, order, strict=True):
        row[: len(pages)] = pages
    cache_shape = (sum(needed), shape.num_kv_heads, BLOCK_SIZE, 2 * size)
    return (
        *fused.split(heads, dim=1),
        draw(cache_shape, dtype=dtype, device=device),
        table.to(device),
        torch.tensor(shape.context_lens, dtype=torch.int32, device=device),
        torch.arange(requests + 1, dtype=torch.int32, device=device) * rows,
        # Lower triangular: row i sees rows 0 to i.
        (-1 << torch.arange(1, rows + 1, device=device)).bitwise_not().repeat(requests),
        size**-0.5,
        rows,
    )


def _gather(*arguments: Any) -> tuple[Any, ...]:
    """Copy the pages side by side: queries, K, V [R, heads, tokens, D], mask [R, rows, tokens]."""
    query, key, value, kv_cache, block_table, context_lens, _, block_mask, scale, max_block_len = (
        arguments
    )
    shape = (block_table.shape[0], max_block_len)
    pages = kv_cache[block_table].transpose(1, 2).flatten(2, 3)
    own = torch.cat((key, value), dim=-1).unflatten(0, shape).transpose(1, 2)
    tokens = torch.cat((pages, own), dim=2)
    bits = torch.arange(max_block_len, device=query.device)
    cached = torch.arange(pages.shape[2], device=query.device) < context_lens[:, None]
    allowed = (block_mask.view(shape)[:, :, None] >> bits & 1).bool()
    mask = torch.cat((cached[:, None].expand(-1, max_block_len, -1), allowed), dim=-1)
    queries = query.unflatten(0, shape).transpose(1, 2)
    return queries, *tokens.chunk(2, dim=-1), mask, scale


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    # Query heads that share a K/V head become rows of it: with `enable_gqa` and a mask PyTorch
    # would leave its fused kernels.
    group = query.shape[1] // key.shape[1]
    rows = query.unflatten(1, (-1, group)).flatten(2, 3)
    mask = mask[:, None].repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(query.shape).transpose(1, 2).flatten(0, 1)


def _gathered_sdpa(*arguments: Any) -> torch.Tensor:
    return _sdpa(*_gather(*arguments))


def _gather_for_flex(*arguments: Any) -> tuple[Any, ...]:
    query, key, value, mask, scale = _gather(*arguments)

    def is_visible(
        request: torch.Tensor, head: torch.Tensor, row: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        return mask[request, row, token]

    requests, rows, tokens = mask.shape
    blocks = create_block_mask(is_visible, requests, None, rows, tokens, device=str(mask.device))
    return query, key.contiguous(), value.contiguous(), blocks, scale


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: BlockMask, scale: float
) -> torch.Tensor:
    out = flex_attention(query, key, value, block_mask=blocks, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)
