"""Writing K and V rows into the paged cache, and rotary embedding, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def check_arguments(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    rotary_table: Tensor | None,
    positions: Tensor | None,
    query: Tensor | None,
    query_positions: Tensor | None,
    value_cache: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The pages of K and those of V.

    Raises:
        ValueError: shapes or dtypes break the contract; the message names the argument.
    """
    if key.dim() != 3:
        raise ValueError(
            f"key: expected [rows, num_kv_heads, head_size], found shape {list(key.shape)}"
        )
    num_rows, num_kv_heads, head_size = key.shape
    if value.shape != key.shape:
        raise ValueError(
            f"value: expected key's shape {list(key.shape)}, found {list(value.shape)}"
        )
    pages = key_and_value_pages(kv_cache, value_cache, num_kv_heads, head_size)
    for name, tensor in (("key", key), ("value", value), ("kv_cache", kv_cache)):
        _check_rows(name, tensor, key.dtype)
    _check_indices("slot_mapping", slot_mapping, num_rows)
    _check_rotation(key, rotary_table, positions)
    if query is None:
        if query_positions is not None:
            raise ValueError("query_positions: expected none without a query")
        return pages
    if query.dim() != 3 or query.shape[2] != head_size:
        raise ValueError(
            f"query: expected [queries, num_heads, {head_size}], found shape {list(query.shape)}"
        )
    _check_rows("query", query, key.dtype)
    if rotary_table is None:
        raise ValueError("rotary_table: expected one to rotate the query with, found none")
    _check_indices("query_positions", query_positions, query.shape[0])
    return pages


def key_and_value_pages(
    kv_cache: Tensor, value_cache: Tensor | None, num_kv_heads: int, head_size: int
) -> tuple[Tensor, Tensor]:
    """A cache's K and V, each [num_blocks, num_kv_heads, block_size, head_size]; strides are equal.

    Raises:
        ValueError: the cache is not as the operations' `kv_cache` and `value_cache` are to be.
    """
    width = head_size if value_cache is not None else 2 * head_size
    if kv_cache.dim() != 4 or kv_cache.shape[1] != num_kv_heads or kv_cache.shape[3] != width:
        raise ValueError(
            f"kv_cache: expected [num_blocks, {num_kv_heads}, block_size, {width}], "
            f"found {list(kv_cache.shape)}"
        )
    if value_cache is None:
        return kv_cache[..., :head_size], kv_cache[..., head_size:]
    expected, found = (
        f"{list(cache.shape)} of {cache.dtype}, strides {cache.stride()}"
        for cache in (kv_cache, value_cache)
    )
    if found != expected:
        raise ValueError(f"value_cache: expected kv_cache's {expected}, found {found}")
    return kv_cache, value_cache


def _check_rotation(key: Tensor, table: Tensor | None, positions: Tensor | None) -> None:
    num_rows, _, head_size = key.shape
    if table is None:
        if positions is not None:
            raise ValueError("positions: expected none without a rotary_table")
        return
    if table.dim() != 2 or table.shape[1] != head_size or head_size % 2:
        raise ValueError(
            f"rotary_table: expected [positions, {head_size}] and an even head_size, "
            f"found {list(table.shape)}"
        )
    _check_rows("rotary_table", table, torch.float32)
    _check_indices("positions", positions, num_rows)


def _check_rows(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, found {tensor.dtype}")
    if tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension, found stride {tensor.stride(-1)}"
        )


def _check_indices(name: str, tensor: Tensor | None, count: int) -> None:
    if tensor is None:
        raise ValueError(f"{name}: expected shape [{count}], found none")
    if tensor.dim() != 1 or tensor.shape[0] != count:
        raise ValueError(f"{name}: expected shape [{count}], found {list(tensor.shape)}")
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name}: expected torch.int64, found {tensor.dtype}")


def rotate(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of `x` [..., heads, D] at integer `positions` [...] (half-split pairs).

    `table` [max_position, D] holds cosines, then sines. Computes in float32 at least, rounds once
    to x's dtype; differentiable.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = table[positions].to(wide).unsqueeze(-2).chunk(2, dim=-1)
    first, second = x.to(wide).chunk(2, dim=-1)
    # first * cos - second * sin and second * cos + first * sin, in fewer passes
    rotated_first = torch.addcmul(first * cos, second, sin, value=-1)
    rotated_second = torch.addcmul(second * cos, first, sin)
    return torch.cat((rotated_first, rotated_second), dim=-1).to(x.dtype)


def kv_store(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    rotary_table: Tensor | None = None,
    positions: Tensor | None = None,
    query: Tensor | None = None,
    query_positions: Tensor | None = None,
    value_cache: Tensor | None = None,
) -> Tensor | None:
    """Rotate and write each row's K and V at its slot, in place; rotate the queries.

    Shapes and dtypes as in `specformer_kernels.kv_store.kv_store`. Reads `slot_mapping` on the
    host.
    """
    pages = check_arguments(
        key,
        value,
        kv_cache,
        slot_mapping,
        rotary_table,
        positions,
        query,
        query_positions,
        value_cache,
    )
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        stored = (slot_mapping >= 0).nonzero().flatten()
        key, value, slot_mapping = key[stored], value[stored], slot_mapping[stored]
        positions = None if positions is None else positions[stored]
    if rotary_table is not None:
        assert positions is not None
        key = rotate(key, rotary_table, positions)
    block_size = kv_cache.shape[2]
    place = (slot_mapping // block_size, slot_mapping % block_size)
    keys, values = (side.transpose(1, 2) for side in pages)  # [blocks, block_size, kv_heads, D]
    keys.index_put_(place, key)
    values.index_put_(place, value)
    if query is None:
        return None
    assert rotary_table is not None
    assert query_positions is not None
    return rotate(query, rotary_table, query_positions)
