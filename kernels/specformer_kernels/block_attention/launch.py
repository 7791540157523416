"""Launching the kernels of block_attention. Imports triton: load this module only to launch."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from specformer_kernels.block_attention.reference import check_arguments
from specformer_kernels.block_attention.triton_attend import _block_attention_kernel
from specformer_kernels.block_attention.triton_combine import _combine_kernel

# Context that a program of its own and a partial result are worth.
MIN_SPLIT_TOKENS = 256
# Requests per step of the search for a split.
BLOCK_R = 256
# Programs per partial result and KV head when partial results are joined.
COMBINE_SHARES = 4


def tile_sizes(
    max_block_len: int, group: int, head_size: int, dtype: torch.dtype
) -> dict[str, int]:
    """Tile sizes, warps and stages, with which no kernel spills registers (tests/kernels/test_aot).

    Two programs or more fit on a multiprocessor, one of float32 with heads above 128.
    """
    block_d = max(16, triton.next_power_of_2(head_size))
    # float32 multiplies without tensor cores, all of a row's products in one thread.
    if dtype == torch.float32:
        sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    else:
        rows = max(16, triton.next_power_of_2(max_block_len * group))
        is_large = block_d > 128
        sizes = {
            "BLOCK_M": min(rows, 32 if is_large else 64),
            "BLOCK_N": 16 if is_large else 32,
            "num_warps": 4,
            # Two tiles of K/V; the other stages go to the page numbers, which must be there first.
            "num_stages": 5,
        }
    if torch.version.hip is None:
        # Left to itself, NVIDIA's assembler may spill a few to fit another program.
        sizes["maxnreg"] = 255
    else:
        sizes["num_stages"] = 2  # 64 KiB of shared memory have to do for several programs
    return {"BLOCK_D": block_d} | sizes


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def target_splits(programs_per_split: int, head_size: int, device: torch.device) -> int:
    """Splits that occupy a whole GPU; the context of a batch is cut into so many."""
    # What is on its way from memory must cover the latency; tiles of small heads hold fewer bytes.
    programs_at_once = 3 if head_size <= 64 else 2
    return multiprocessors(device) * programs_at_once // programs_per_split


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    block_start_loc: Tensor,
    block_mask: Tensor,
    scale: float,
    max_block_len: int,
    value_cache: Tensor | None = None,
    pages_per_block: int = 1,
    window: int = 0,
    sinks: int = 0,
) -> Tensor:
    """Launch one program per split of context, KV head and tile of rows, then join the splits.

    Shapes and dtypes as in `specformer_kernels.block_attention.block_attention`. Nothing is read on
    the host: the grids follow from shapes, `max_block_len` and the device, so the launches can be
    captured in a CUDA graph.
    """
    key_pages, value_pages = check_arguments(
        query,
        key,
        value,
        kv_cache,
        block_table,
        context_lens,
        block_start_loc,
        block_mask,
        max_block_len,
        value_cache,
        pages_per_block,
        window,
        sinks,
    )
    if query.dtype == torch.float64:
        raise ValueError("query: the kernel computes in float32, found torch.float64")
    if block_table.stride(-1) != 1:
        raise ValueError(
            f"block_table: expected a contiguous last dimension, found {block_table.stride(-1)}"
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    num_requests, num_kv_heads, head_size = block_table.shape[0], key.shape[1], query.shape[2]
    group = query.shape[1] // num_kv_heads
    max_rows = max_block_len * group
    tiles = tile_sizes(max_block_len, group, head_size, query.dtype)
    num_tiles = triton.cdiv(max_rows, tiles["BLOCK_M"])

    splits = target_splits(num_kv_heads * num_tiles, head_size, query.device)
    # The longest context that the table has room for.
    max_context = block_table.shape[1] * pages_per_block * kv_cache.shape[2]
    visible = sinks + window if window else 0
    if visible:
        max_context = min(max_context, visible)
    is_split = splits > 1 and max_context > MIN_SPLIT_TOKENS
    partials: tuple[Tensor | None, ...] = (None, None, None)
    if is_split:
        # A split request has fewer than 2 * its length / the split's, all of them fewer than this.
        shape = (2 * splits, num_kv_heads, max_rows)
        partials = tuple(
            torch.empty(size, dtype=torch.float32, device=query.device)
            for size in ((*shape, head_size), shape, shape)
        )
    splitting = {
        "MIN_TOKENS": MIN_SPLIT_TOKENS,
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "BLOCK_R": BLOCK_R,
        "VISIBLE": visible,
    }
    with torch.cuda.device_of(query):
        # A request's last split is a fraction of one, so requests and splits bound the splits.
        grid = ((num_requests + splits * is_split) * num_tiles, num_kv_heads)
        _block_attention_kernel[grid](
            out,
            *partials,
            query,
            key,
            value,
            key_pages,
            value_pages,
            block_table,
            context_lens,
            block_start_loc,
            block_mask,
            num_requests,
            splits,
            max_rows,
            scale * math.log2(math.e),
            out.stride(0),
            out.stride(1),
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.stride(2),
            block_table.stride(0),
            IS_SPLIT=is_split,
            PAGE_SIZE=kv_cache.shape[2],
            PAGES_PER_BLOCK=pages_per_block,
            SINKS=sinks,
            **splitting,
            **tiles,
        )
        if is_split:
            _combine_kernel[(2 * splits, num_kv_heads, COMBINE_SHARES)](
                out,
                *partials,
                context_lens,
                block_start_loc,
                num_requests,
                splits,
                max_rows,
                out.stride(0),
                out.stride(1),
                BLOCK_N=tiles["BLOCK_N"],
                BLOCK_S=16,
                BLOCK_D=tiles["BLOCK_D"],
                num_warps=2,
                **splitting,
            )
    return out
