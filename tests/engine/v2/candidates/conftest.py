"""Engines whose drafts are trees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def trees_can_attend() -> Iterator[None]:
    """The CPU's attention, laid out as FlashAttention's, for every engine of these tests."""
    from support.v2.tree_attention import tree_attention

    with tree_attention():
        yield
