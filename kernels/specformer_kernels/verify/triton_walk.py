"""From accepted nodes to the path from the root, and its result; one program per request."""

# Arguments of kernels and device functions are untyped but for constexprs, upper case by Triton's
# custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.verify.triton_draw import NO_TOKEN
from specformer_kernels.verify.triton_rows import load_nodes, rows_of_request

# Pairs of nodes are taken by strips: all of them at once would take too many registers.
STRIP = tl.constexpr(16)


@triton.jit
def of_parent(b_value, b_parent):
    """Each node's parent's value; the root's where there is no parent."""
    return tl.gather(b_value, tl.maximum(b_parent, 0), 0)


@triton.jit
def value_at(b_value, b_node, node):
    """One node's value."""
    return tl.sum(tl.where(b_node == node, b_value, 0), 0)


@triton.jit
def sum_before(b_value, b_key, b_wanted, b_node, num_rows):
    """[n]: sum of the values of those nodes k before n whose key is the one that n wants."""
    b_sum = tl.where(b_node < 0, b_value, 0)
    for first in range(0, num_rows, STRIP):
        b_other = first + tl.arange(0, STRIP)
        b_other_key = tl.gather(b_key, b_other, 0)
        is_match = b_wanted[:, None] == b_other_key[None, :]
        is_match = is_match & (b_other[None, :] < b_node[:, None])
        b_sum += tl.sum(tl.where(is_match, tl.gather(b_value, b_other, 0)[None, :], 0), 1)
    return b_sum


@triton.jit
def path_of(b_accepted, b_node, b_parent, num_rows):
    """Nodes on the path from the root along each node's first accepted child; and all depths."""
    b_is_accepted = (b_accepted & (b_parent >= 0)).to(tl.int32)
    is_first = sum_before(b_is_accepted, b_parent, b_parent, b_node, num_rows) == 0
    b_is_on = tl.where(is_first, b_is_accepted, 0) | (b_node == 0).to(tl.int32)
    b_depth = (b_node > 0).to(tl.int32)
    b_above = tl.maximum(b_parent, 0)
    # Every turn doubles the number of ancestors that a node has heard of.
    reach = 1
    while reach < num_rows:
        b_is_on = b_is_on & tl.gather(b_is_on, b_above, 0)
        b_depth += tl.gather(b_depth, b_above, 0)
        b_above = tl.gather(b_above, b_above, 0)
        reach *= 2
    return b_is_on > 0, b_depth


@triton.jit
def load_partials(
    partials_ptr,  # [N, num_fields, BLOCK_C]
    rows,  # row of each node
    is_row,
    field,
    num_fields,
    num_chunks,
    other,
    BLOCK_C: tl.constexpr,  # chunks, padded to a power of two
):
    """One field of each node's partial results, [nodes, BLOCK_C]."""
    b_chunk = tl.arange(0, BLOCK_C)
    offsets = ((rows * num_fields + field) * BLOCK_C)[:, None] + b_chunk[None, :]
    mask = is_row[:, None] & (b_chunk < num_chunks)[None, :]
    return tl.load(partials_ptr + offsets, mask=mask, other=other)


@triton.jit
def best_tokens(
    partials_ptr,  # [N, num_fields, BLOCK_C], max in the first field
    winners_ptr,  # [N, BLOCK_C]
    rows,
    is_row,
    num_fields,
    num_chunks,
    BLOCK_C: tl.constexpr,
):
    """The token that each node's row chose, the first of equals; -1 if it cannot be sampled."""
    b_best = load_partials(
        partials_ptr, rows, is_row, 0, num_fields, num_chunks, float("-inf"), BLOCK_C
    )
    b_winner = load_partials(winners_ptr, rows, is_row, 0, 1, num_chunks, NO_TOKEN, BLOCK_C)
    best = tl.max(b_best, 1)
    winner = tl.min(tl.where(b_best == best[:, None], b_winner, NO_TOKEN), 1)
    is_usable = (best > float("-inf")) & (best < float("inf"))
    return tl.where(is_usable, winner, -1)


@triton.jit
def store_path(
    out,  # pointers to tokens, num_tokens, rows
    b_node,
    b_token,
    b_depth,
    b_is_on,
    is_usable,
    last_token,
    request,
    start,
    max_rows,
):
    """Write a request's result: all -1 and no tokens unless `is_usable`."""
    out_tokens_ptr, num_tokens_ptr, out_rows_ptr = out
    is_on = tl.where(is_usable, b_is_on.to(tl.int32), 0) > 0
    num_tokens = tl.sum(is_on.to(tl.int32), 0)
    out_tokens_ptr += request * max_rows
    out_rows_ptr += request * max_rows
    is_spare = (b_node >= num_tokens) & (b_node < max_rows)
    tl.store(out_rows_ptr + b_depth, start + b_node, mask=is_on)
    tl.store(out_rows_ptr + b_node, -1, mask=is_spare)
    tl.store(out_tokens_ptr + b_depth - 1, b_token, mask=is_on & (b_node > 0))
    tl.store(out_tokens_ptr + b_node, -1, mask=is_spare)
    tl.store(out_tokens_ptr + num_tokens - 1, last_token, mask=is_usable)
    tl.store(num_tokens_ptr + request, num_tokens)


@triton.jit
def store_followed(
    out,  # pointers to tokens, num_tokens, rows
    b_sampled,  # [nodes] token of the target; negative: cannot be sampled
    b_node,
    b_token,
    b_parent,
    request,
    start,
    num_rows,
    max_rows,
):
    """Keep the nodes that agree with their parents' sampled tokens."""
    b_is_on, b_depth = path_of(
        of_parent(b_sampled, b_parent) == b_token, b_node, b_parent, num_rows
    )
    is_usable = tl.sum((b_is_on & (b_sampled < 0)).to(tl.int32), 0) == 0
    token = value_at(b_sampled, b_node, tl.max(tl.where(b_is_on, b_node, 0), 0))
    store_path(out, b_node, b_token, b_depth, b_is_on, is_usable, token, request, start, max_rows)


@triton.jit(do_not_specialize=["max_rows"])
def _follow_kernel(
    out_tokens_ptr,  # [R, max_rows] int64
    num_tokens_ptr,  # [R] int32
    out_rows_ptr,  # [R, max_rows] int64
    sampled_ptr,  # [N], or None: the best of the partial results
    partials_ptr,  # [N, 1, BLOCK_C]
    winners_ptr,  # [N, BLOCK_C]
    tokens_ptr,  # [N]
    row_start_loc_ptr,  # [R + 1]
    parents_ptr,  # [N], or None for chains
    num_chunks,
    vocab_size,
    max_rows,
    BLOCK_R: tl.constexpr,  # rows of a request, padded to a power of two
    BLOCK_C: tl.constexpr,  # chunks, padded to a power of two
):
    request = tl.program_id(0).to(tl.int64)
    start, num_rows = rows_of_request(row_start_loc_ptr, request, max_rows)
    b_node, b_token, b_parent = load_nodes(
        tokens_ptr, parents_ptr, start, num_rows, vocab_size, BLOCK_R
    )
    rows, is_row = start + b_node, b_node < num_rows
    if sampled_ptr is not None:
        b_sampled = tl.load(sampled_ptr + rows, mask=is_row, other=-1)
    else:
        b_sampled = best_tokens(partials_ptr, winners_ptr, rows, is_row, 1, num_chunks, BLOCK_C)
    out = out_tokens_ptr, num_tokens_ptr, out_rows_ptr
    store_followed(out, b_sampled, b_node, b_token, b_parent, request, start, num_rows, max_rows)
