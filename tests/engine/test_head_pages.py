"""The head's rows in pages of target layers: none overlap, and nothing of others is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_specformer.engine.head_pages import HeadShape, lay_out, layers_needed, rows_per_layer

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
BLOCK_SIZE, NUM_BLOCKS = 32, 3
LAYOUTS = list(KVCacheLayout)


def full(kv_heads: int, head_size: int, dtype: torch.dtype = BF16, **more: Any) -> Any:
    return FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=kv_heads, head_size=head_size, dtype=dtype, **more
    )


def mla(dtype: torch.dtype = BF16, **more: Any) -> Any:
    return MLAAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=576, dtype=dtype, **more
    )


@dataclass(frozen=True)
class Case:
    """A target layer's spec and a head; layers and parts in which its K and V lie in LBNHC."""

    spec: Any
    head: HeadShape
    layers: int
    parts: int


TWO_SLOTS = {"num_head_slots": 2, "state_content_bytes": 4 * 64 * 2}
CASES = {
    "equal": Case(full(4, 64), HeadShape(4, 64, BF16), 1, 1),
    "equal, one head": Case(full(1, 64), HeadShape(1, 64, BF16), 1, 1),
    "fp8": Case(full(4, 64, FP8), HeadShape(4, 64, BF16), 2, 1),
    "fp8, one head": Case(full(1, 64, FP8), HeadShape(1, 64, BF16), 2, 1),
    "kernel blocks": Case(
        full(4, 64, FP8, block_stride_alignment=MultipleOf(16)), HeadShape(4, 64, BF16), 2, 1
    ),
    "K and V in slots of their own": Case(full(4, 64, **TWO_SLOTS), HeadShape(4, 64, BF16), 1, 1),
    "larger heads": Case(full(4, 128), HeadShape(8, 64, BF16), 1, 1),
    "fewer heads": Case(full(4, 64), HeadShape(2, 64, BF16), 1, 1),
    "head not cut": Case(full(1, 64), HeadShape(4, 64, BF16), 4, 2),
    "MLA": Case(mla(), HeadShape(8, 64, BF16), 2, 1),
    "MLA, many heads": Case(mla(), HeadShape(16, 64, BF16), 4, 2),
    "MLA, one head": Case(mla(), HeadShape(1, 64, BF16), 1, 1),
    "packed MLA": Case(mla(torch.uint8, state_content_bytes=656), HeadShape(2, 128, BF16), 2, 1),
    "scales behind each token": Case(
        full(2, 64, torch.int8, state_content_bytes=136), HeadShape(2, 64, BF16), 2, 1
    ),
    "float32": Case(full(2, 64, FP8), HeadShape(1, 32, torch.float32), 1, 1),
}


def allocate(spec: Any, num_layers: int, layout: KVCacheLayout, kernel: int) -> dict[str, Tensor]:
    """Three layers of the target and the head's behind them, as vLLM allocates a group."""
    names = [f"target.{i}" for i in range(3)] + [f"head.{i}" for i in range(num_layers)]
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        num_gpu_blocks_override=NUM_BLOCKS,
        prefix_cache_retention_interval=None,
    )
    config = SimpleNamespace(
        cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None)
    )
    groups = [KVCacheGroupSpec(names, spec)]
    config_ = get_kv_cache_config_from_groups(config, groups, available_memory=1 << 30)
    return allocate_kv_cache(config_, torch.device("cpu"), layout, [kernel])


def check(case: Case, layout: KVCacheLayout, dense: bool, kernel: int = BLOCK_SIZE) -> int:
    """Write every row and read it back; the bytes of the target's layers stay.

    Returns:
        The number of parts.
    """
    caches = allocate(case.spec, case.layers, layout, kernel)
    own = [cache for name, cache in caches.items() if name.startswith("head")]
    others = [cache for name, cache in caches.items() if not name.startswith("head")]
    for cache in others:
        cache.view(torch.uint8).fill_(7)
    parts = lay_out(own, case.head, dense)
    assert [part.heads.start for part in parts] == [0, *(part.heads.stop for part in parts)][:-1]
    assert parts[-1].heads.stop == case.head.kv_heads
    pages = [side for part in parts for side in (part.key, part.value)]
    blocks = NUM_BLOCKS * BLOCK_SIZE // kernel
    written = []
    for part in parts:
        assert part.key.stride() == part.value.stride()
        assert part.key.shape[1] == part.heads.stop - part.heads.start
    for side in pages:
        assert side.shape[0] == blocks
        assert side.shape[2:] == (kernel, case.head.head_size)
        values = torch.randn(side.shape).to(side.dtype)
        side.copy_(values)
        written.append(values)
        if dense:
            assert side.stride()[2:] == (case.head.head_size, 1)
    for side, values in zip(pages, written, strict=True):
        assert torch.equal(side, values)
    assert all(bool((cache.view(torch.uint8) == 7).all()) for cache in others)
    return len(parts)


@pytest.mark.parametrize("name", CASES)
def test_layers_needed(name: str) -> None:
    case = CASES[name]
    rows = rows_per_layer(case.spec, case.head)
    assert layers_needed(rows, case.head.kv_heads) == case.layers


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", CASES)
def test_every_row_has_a_place(name: str, layout: KVCacheLayout) -> None:
    parts = check(CASES[name], layout, dense=False)
    if layout == KVCacheLayout.LBNHC:
        assert parts == CASES[name].parts


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"scales behind each token"}))
@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC])
def test_without_gaps(name: str, layout: KVCacheLayout) -> None:
    """As a CPU's kernels want a head's pages; no CPU cache has scales in its pages."""
    assert check(CASES[name], layout, dense=True) <= max(CASES[name].parts, 2)


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC])
@pytest.mark.parametrize("name", ["equal", "kernel blocks", "MLA, many heads"])
def test_blocks_split_by_the_backend(name: str, layout: KVCacheLayout) -> None:
    assert check(CASES[name], layout, dense=False, kernel=16) == CASES[name].parts


def test_padded_pages() -> None:
    case = CASES["fp8"]
    spec = replace(case.spec, page_size_padded=case.spec.page_size_bytes + 512)
    check(replace(case, spec=spec), KVCacheLayout.LBNHC, dense=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_equal_shapes_are_laid_out_as_the_target_is(layout: KVCacheLayout) -> None:
    """What moves heads between ranks, or tokens between layouts, finds them where it looks."""
    case = CASES["equal"]
    cache = allocate(case.spec, 1, layout, BLOCK_SIZE)["head.0"]
    (part,) = lay_out([cache], case.head, dense=False)
    key, value = cache.chunk(2, dim=-1)
    for found, expected in ((part.key, key), (part.value, value)):
        assert found.stride() == expected.stride()
        assert found.data_ptr() == expected.data_ptr()


def test_a_layout_without_room_is_refused() -> None:
    """Slots narrower than a row can only be used together, where a page is one piece of memory."""
    case = Case(full(4, 32), HeadShape(1, 128, BF16), 1, 1)
    check(case, KVCacheLayout.LBHNC, dense=False)
    with pytest.raises(ValueError, match=r"VLLM_KV_CACHE_LAYOUT: .* set it to LBHNC"):
        check(case, KVCacheLayout.LHBNC, dense=False)
