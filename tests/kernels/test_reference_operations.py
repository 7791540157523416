"""The references are vectorised: what they ask PyTorch for does not grow with the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specformer_kernels.block_attention import reference
from specformer_kernels.kv_store import kv_store
from torch.utils._python_dispatch import TorchDispatchMode


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
    """What storing, then uniform blocks and the way for uneven ones ask for."""
    lens = torch.tensor([40 - request % 7 * is_ragged for request in range(requests)])
    cache = torch.zeros(requests * 3, 2, 16, 32, dtype=dtype)
    table = torch.randperm(requests * 3).view(requests, 3).int()
    query = torch.randn(requests * 3, 4, 16).to(dtype)
    key, value = torch.randn(2, requests * 3, 2, 16).to(dtype)
    starts = torch.arange(requests + 1, dtype=torch.int32) * 3
    words = torch.full((requests * 3,), 7, dtype=torch.int64)
    with Operations() as asked:
        kv_store(key, value, cache, torch.arange(requests * 3))
        for longest in (3, 4):
            reference.block_attention(
                query, key, value, cache, table, lens, starts, words, 0.25, longest
            )
    return asked.names


@pytest.mark.parametrize("is_ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_loop_over_requests(dtype: torch.dtype, is_ragged: bool) -> None:
    one, few, many = (operations_of_a_step(n, dtype, is_ragged) for n in (1, 8, 64))
    assert few == many
    # One request saves the copies of a dimension of size 1.
    assert len(one) <= len(many) < 300
