"""Attention of a block of new rows over paged context and, by bit mask, over the block itself."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.block_attention import reference
from specformer_kernels.block_attention.reference import page_table

__all__ = ["block_attention", "page_table"]


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
    """Attend each row to its request's cached context and to the allowed rows of its own block.

    T rows of R requests, request-major, rotary embedding already applied; one softmax over context
    and block. Triton on a GPU, PyTorch elsewhere.

    Args:
        query: [T, num_heads, head_size] floating point, last dimension contiguous.
        key: [T, num_kv_heads, head_size], query's dtype; num_heads % num_kv_heads == 0.
        value: like `key`.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_size], query's dtype; K in the first
            half of the last dimension, V in the second. Any strides but the last's.
        block_table: [R, max_blocks] int32, the blocks of each request's context in order; entries
            past a request's own blocks are ignored.
        context_lens: [R] int32 or int64, cached tokens every row of the request sees; may be 0.
        block_start_loc: [R + 1] int32; request r has rows block_start_loc[r] up to, not including,
            block_start_loc[r + 1]. No rows is legal.
        block_mask: [T] int64; bit j is set iff the row attends to row j of its own request. Bits
            past the request's rows are ignored; a row that sees nothing at all gives zeros.
        scale: factor on the scores before the softmax.
        max_block_len: upper bound of the rows of one request, 1 to 64.
        value_cache: the context's V if it does not lie beside K. Both caches then are [num_blocks,
            num_kv_heads, block_size, head_size], with equal strides.
        pages_per_block: pages that each block of the table consists of: block b is the pages from
            b * pages_per_block on.
        window: if not 0, rows see only the last so many tokens of their context, and the first
            `sinks` of it (Xiao et al., arXiv 2309.17453, section 3.2). Tokens between them are not
            read.
        sinks: with a window, first tokens of the context that are seen whatever its length is.

    Returns:
        [T, num_heads, head_size] in query's dtype, contiguous. Rows at or past block_start_loc[R]
        belong to no request and are undefined.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if query.is_cuda:
        from specformer_kernels.block_attention import launch

        implementation = launch.block_attention
    else:
        implementation = reference.block_attention
    return implementation(
        query,
        key,
        value,
        kv_cache,
        block_table,
        context_lens,
        block_start_loc,
        block_mask,
        scale,
        max_block_len,
        value_cache,
        pages_per_block,
        window,
        sinks,
    )
