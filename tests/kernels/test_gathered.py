"""The CPU's gathered context against the general reference, in float64."""

from __future__ import annotations

import pytest
import torch
from specformer_kernels.block_attention.gathered import GatheredContext
from specformer_kernels.block_attention.reference import block_attention

EXACT = 1e-12  # float64 on both sides; only the order of summation differs


def make_cache(blocks: int, kv_heads: int, block_size: int, head_size: int) -> torch.Tensor:
    """Pages whose strides skip over another layer, filled with NaN: unowned rows must not leak."""
    store = torch.full((blocks, 2, kv_heads, block_size, 2 * head_size), float("nan")).double()
    return store[:, 1]


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("lens", [[1], [63, 1, 17], [32, 16, 64]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("rows", [1, 5])
def test_equals_block_attention(
    block_size: int, lens: list[int], heads: int, kv_heads: int, rows: int
) -> None:
    torch.manual_seed(0)
    head_size, requests = 16, len(lens)
    per_request = -(-max(lens) // block_size)
    order = torch.randperm(requests * per_request) + 1
    table = order.view(requests, per_request).int()
    cache = make_cache(requests * per_request + 1, kv_heads, block_size, head_size)
    for request, length in enumerate(lens):
        for position in range(length):
            block = table[request, position // block_size]
            row = torch.randn(kv_heads, 2 * head_size, dtype=torch.float64)
            cache[block, :, position % block_size] = row
    query = torch.randn(requests, rows, heads, head_size, dtype=torch.float64)
    key, value = torch.randn(2, requests, rows, kv_heads, head_size, dtype=torch.float64)
    before = cache.clone()

    context = GatheredContext(cache, table, torch.tensor(lens), room=rows)
    alone = context.attend(query, 0.25)
    context.append(key, value)
    both = context.attend(query, 0.25)

    def reference(mask: int) -> torch.Tensor:
        total = requests * rows
        out = block_attention(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            cache,
            table,
            torch.tensor(lens),
            torch.arange(requests + 1, dtype=torch.int32) * rows,
            torch.full((total,), mask, dtype=torch.int64),
            0.25,
            rows,
        )
        return out.view_as(query)

    assert (alone - reference(0)).abs().max() < EXACT
    assert (both - reference((1 << rows) - 1)).abs().max() < EXACT
    assert torch.equal(cache.nan_to_num(), before.nan_to_num()), "the pages were written to"
