"""Heads whose K/V lie in several parts are put together again in their order."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_specformer.engine.attention import SplitContext, UnboundContext

KV_HEADS, GROUP, SIZE = 4, 2, 3
PARTS = [slice(0, 3), slice(3, 4)]


class Marked:
    """A part's context: what it is given, and which part it is."""

    def __init__(self, mark: float) -> None:
        self.mark = mark

    def anchors(self, query: Tensor) -> Tensor:
        return query + self.mark

    def slots(self, query: Tensor, key: Tensor, value: Tensor, mixed: bool) -> Tensor:
        return query + self.mark + (key + 10 * value).repeat_interleave(GROUP, dim=-2)


def test_parts_get_their_heads_and_give_them_back_in_order() -> None:
    context = SplitContext(PARTS, [Marked(100.0), Marked(200.0)], KV_HEADS)
    marks = torch.tensor([100.0] * 6 + [200.0] * 2)[:, None]
    query = torch.randn(5, KV_HEADS * GROUP, SIZE)
    assert torch.equal(context.anchors(query), query + marks)

    query = torch.randn(5, 2, KV_HEADS * GROUP, SIZE)
    key, value = torch.randn(2, 5, 2, KV_HEADS, SIZE)
    expected = query + marks + (key + 10 * value).repeat_interleave(GROUP, dim=-2)
    assert torch.equal(context.slots(query, key, value, mixed=True), expected)


def test_without_a_cache_a_step_has_its_shapes() -> None:
    query, key = torch.randn(5, 2, 8, SIZE), torch.randn(5, 2, 4, SIZE)
    assert not UnboundContext().slots(query, key, key, mixed=True).any()
    assert UnboundContext().anchors(query[:, 0]).shape == (5, 8, SIZE)
