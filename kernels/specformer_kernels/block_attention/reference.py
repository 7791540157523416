"""Attention with a block mask in plain PyTorch: the oracle of the kernel and the path on CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specformer_kernels.kv_store.reference import key_and_value_pages

# A row's allowed columns are the bits of one int64 word.
MAX_BLOCK_LEN = 64


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    block_start_loc: Tensor,
    block_mask: Tensor,
    max_block_len: int,
    value_cache: Tensor | None,
    pages_per_block: int,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """The pages of K and those of V.

    Raises:
        ValueError: shapes or dtypes break the contract; the message names the argument.
    """
    if query.dim() != 3:
        raise ValueError(
            f"query: expected [rows, num_heads, head_size], found shape {list(query.shape)}"
        )
    num_rows, num_heads, head_size = query.shape
    if key.dim() != 3 or key.shape[0] != num_rows or key.shape[2] != head_size:
        raise ValueError(
            f"key: expected [{num_rows}, num_kv_heads, {head_size}], found {list(key.shape)}"
        )
    num_kv_heads = key.shape[1]
    if value.shape != key.shape:
        raise ValueError(
            f"value: expected key's shape {list(key.shape)}, found {list(value.shape)}"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"query: num_heads must be a multiple of key's {num_kv_heads} heads, found {num_heads}"
        )
    pages = key_and_value_pages(kv_cache, value_cache, num_kv_heads, head_size)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("kv_cache", kv_cache)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: expected query's dtype {query.dtype}, found {tensor.dtype}")
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, found stride {tensor.stride(-1)}"
            )
    if block_table.dim() != 2:
        raise ValueError(
            f"block_table: expected [requests, max_blocks], found {list(block_table.shape)}"
        )
    num_requests = block_table.shape[0]
    for name, tensor, length in (
        ("context_lens", context_lens, num_requests),
        ("block_start_loc", block_start_loc, num_requests + 1),
        ("block_mask", block_mask, num_rows),
    ):
        if tensor.dim() != 1 or tensor.shape[0] != length:
            raise ValueError(f"{name}: expected shape [{length}], found {list(tensor.shape)}")
    if block_mask.dtype != torch.int64:
        raise ValueError(f"block_mask: expected torch.int64 words, found {block_mask.dtype}")
    if not 1 <= max_block_len <= MAX_BLOCK_LEN:
        raise ValueError(f"max_block_len: expected 1 to {MAX_BLOCK_LEN}, found {max_block_len}")
    if pages_per_block < 1:
        raise ValueError(f"pages_per_block: expected 1 or more, found {pages_per_block}")
    if window < 0 or sinks < 0 or (sinks and not window):
        raise ValueError(
            f"window, sinks: expected two numbers from 0 on, no sinks without a window, found "
            f"{window} and {sinks}"
        )
    return pages


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

    Shapes and dtypes as in `specformer_kernels.block_attention.block_attention`. Computes in
    float32, or in float64 for float64 inputs. Reads `context_lens` on the host.
    """
    pages = check_arguments(
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
    block_table = page_table(block_table, pages_per_block)
    num_rows, num_requests = query.shape[0], block_table.shape[0]
    if num_rows == 0:
        return torch.zeros_like(query)

    shape = (num_requests, max_block_len)
    columns = torch.arange(max_block_len, device=query.device)
    # No request exceeds max_block_len, so a total at the bound means that all are that long.
    if num_rows == num_requests * max_block_len:
        allowed = _unpack_words(block_mask.view(shape), columns)
        query, key, value = (rows.unflatten(0, shape) for rows in (query, key, value))
        seen = visible_positions(context_lens, window, sinks)
        out = _attend(query, key, value, allowed, pages, block_table, seen, scale)
        return out.flatten(0, 1)

    row_index = block_start_loc[:-1, None] + columns  # [requests, max_block_len]
    is_row = row_index < block_start_loc[1:, None]
    row_index = row_index.clamp(max=num_rows - 1).long()
    allowed = _unpack_words(block_mask[row_index], columns) & is_row[:, None, :]
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    query, key, value = (rows[row_index] for rows in (query, key, value))
    seen = visible_positions(context_lens, window, sinks)
    padded = _attend(query, key, value, allowed, pages, block_table, seen, scale)
    out[row_index[is_row]] = padded[is_row]
    return out


def page_table(block_table: Tensor, pages_per_block: int) -> Tensor:
    """The pages of each block of a table [R, blocks] in order: [R, blocks * pages_per_block]."""
    if pages_per_block == 1:
        return block_table
    within = torch.arange(pages_per_block, dtype=block_table.dtype, device=block_table.device)
    return (block_table[:, :, None] * pages_per_block + within).flatten(1)


def _unpack_words(words: Tensor, columns: Tensor) -> Tensor:
    """Bit masks [requests, rows] -> bool [requests, rows, columns]."""
    return ((words[:, :, None] >> columns) & 1).bool()


def visible_positions(context_lens: Tensor, window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Positions of the cached tokens that each request's rows see, side by side.

    Returns:
        int64 [R, length], and bool [R, length], which of them there are.
    """
    lens = context_lens.clamp(max=sinks + window) if window else context_lens
    columns = torch.arange(int(lens.max()), device=lens.device)
    visible = columns < lens[:, None]
    if not window:
        return columns.expand_as(visible), visible
    skipped = (context_lens - lens)[:, None]
    return torch.where(columns < sinks, columns, columns + skipped), visible


def gather_context(
    pages: tuple[Tensor, Tensor], block_table: Tensor, positions: Tensor, visible: Tensor
) -> Tensor:
    """Cached K and V of every request side by side: [2, num_kv_heads, R, length, head_size].

    Args:
        pages: of K and of V, each [num_blocks, num_kv_heads, block_size, head_size].
        positions, visible: see `visible_positions`. Columns that are not visible get copies of the
            request's first one, which is as finite as the request is: a weight of 0 does not
            silence a NaN left in a page by another request.
    """
    key_pages, value_pages = pages
    num_kv_heads, block_size, head_size = key_pages.shape[1:]
    requests, length = visible.shape
    (key_rows, steps), (value_rows, _) = _as_rows(key_pages), _as_rows(value_pages)
    has_context = visible[:, :1]
    all_have = bool(has_context.all())
    if not all_have:  # nor is the first entry of the table defined
        block_table = torch.where(has_context, block_table, 0)
    block = (positions // block_size).clamp_(max=block_table.shape[1] - 1)
    place = block_table.long().mul_(steps[0]).gather(1, block)  # [R, length]
    place += positions % block_size * steps[2]
    place = torch.where(visible, place, place[:, :1])
    heads = torch.arange(num_kv_heads, device=key_pages.device) * steps[1]
    place = (place + heads[:, None, None]).flatten()
    shape = (2, num_kv_heads, requests, length, head_size)
    context = key_pages.new_empty(shape)
    key, value = context.flatten(1, 3)
    torch.index_select(key_rows, 0, place, out=key)
    torch.index_select(value_rows, 0, place, out=value)
    if not all_have:
        context.masked_fill_(~has_context[:, None], 0.0)
    return context


def _as_rows(pages: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The pages of K or V as rows of head_size elements, which may overlap.

    Selecting rows copies memory; indexing the cache itself would go through its strides.

    Returns:
        The rows, and how many to go for the next block, K/V head and token.
    """
    head_size, strides = pages.shape[3], pages.stride()[:3]
    unit = math.gcd(*strides)
    steps = tuple(stride // unit for stride in strides)
    last = sum((n - 1) * step for n, step in zip(pages.shape[:3], steps, strict=True))
    return pages.as_strided((last + 1, head_size), (unit, 1)), steps


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    pages: tuple[Tensor, Tensor],
    block_table: Tensor,
    seen: tuple[Tensor, Tensor],
    scale: float,
) -> Tensor:
    """Blocks padded to one length: query [requests, rows, num_heads, head_size] -> same shape.

    `allowed` [requests, rows, rows] says which column of the block each row sees, `seen` which
    cached tokens (see `visible_positions`).
    """
    num_requests, num_rows, num_heads, head_size = query.shape
    num_kv_heads = key.shape[2]
    compute_dtype = torch.promote_types(query.dtype, torch.float32)

    # Heads that share a KV head become rows of one matrix, [.., group * rows, head_size].
    grouped = query.unflatten(2, (num_kv_heads, -1)).permute(2, 0, 3, 1, 4)
    b_query = (grouped.to(compute_dtype) * scale).reshape(num_kv_heads, num_requests, -1, head_size)
    b_key = key.permute(2, 0, 3, 1).to(compute_dtype)
    b_value = value.permute(2, 0, 1, 3).to(compute_dtype)
    by_head = (num_kv_heads, num_requests, -1, num_rows, num_rows)
    scores = (b_query @ b_key).view(by_head)
    scores = scores.masked_fill(~allowed[:, None], float("-inf")).flatten(2, 3)

    positions, visible = seen
    longest = visible.shape[1]
    if longest:
        context = gather_context(pages, block_table, positions, visible).to(compute_dtype)
        context_scores = b_query @ context[0].transpose(-1, -2)
        context_scores = context_scores.masked_fill(~visible[:, None], float("-inf"))
        scores = torch.cat((context_scores, scores), dim=-1)

    weights = scores.softmax(dim=-1)
    if not longest or not bool(visible[:, 0].all()):
        sees_nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)
        weights = weights.masked_fill(sees_nothing, 0.0)
    out = weights[..., longest:] @ b_value
    if longest:
        out = out + weights[..., :longest] @ context[1]
    out = out.view(num_kv_heads, num_requests, -1, num_rows, head_size).permute(1, 3, 0, 2, 4)
    return out.reshape(num_requests, num_rows, num_heads, head_size).to(query.dtype)
