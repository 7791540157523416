"""The pass over all rows: what each chunk of a row's logits amounts to."""

# Arguments of kernels and device functions are untyped but for constexprs, upper case by Triton's
# custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.noise import Stream
from specformer_kernels.verify.triton_draw import (
    draw_by_logit,
    exponent_scale,
    first_max,
    weights_of,
)

TARGET = tl.constexpr(int(Stream.TARGET))


@triton.jit
def rows_of_request(row_start_loc_ptr, request, max_rows):
    """First row and number of rows; none where the bounds run backwards."""
    start = tl.load(row_start_loc_ptr + request).to(tl.int64)
    end = tl.load(row_start_loc_ptr + request + 1).to(tl.int64)
    return start, tl.maximum(tl.minimum(end - start, max_rows), 0).to(tl.int32)


@triton.jit
def load_nodes(
    tokens_ptr,  # [N]
    parents_ptr,  # [N], or None for chains
    start,  # first row of the request
    num_rows,
    vocab_size,
    BLOCK_R: tl.constexpr,
):
    """A request's nodes: index, token, and parent; -1 where no node has the row as a child."""
    b_node = tl.arange(0, BLOCK_R)
    is_node = (b_node > 0) & (b_node < num_rows)
    b_token = tl.load(tokens_ptr + start + b_node, mask=is_node, other=-1)
    if parents_ptr is None:
        b_parent = b_node - 1
    else:
        b_parent = tl.load(parents_ptr + start + b_node, mask=is_node, other=-1)
    is_child = is_node & (b_parent >= 0) & (b_parent < b_node)
    is_child = is_child & (b_token >= 0) & (b_token < vocab_size)
    return b_node, b_token, tl.where(is_child, b_parent, -1)


@triton.jit
def proposal_of(draft_rows_ptr, row, num_draft_rows, is_wanted):
    """Rows of the draft logits that rows' children were drawn from; -1 for none or unwanted."""
    source = tl.load(draft_rows_ptr + row, mask=is_wanted, other=-1).to(tl.int64)
    return tl.where((source >= 0) & (source < num_draft_rows), source, -1)


@triton.jit
def load_logits(logits_ptr, row, stride, b_token, vocab_size):
    """Logits of one chunk of a row in float32, -inf past the vocabulary; all -inf without a row."""
    mask = b_token < tl.where(row >= 0, vocab_size, 0)
    b_logit = tl.load(logits_ptr + row * stride + b_token, mask=mask, other=float("-inf"))
    return b_logit.to(tl.float32)


@triton.jit
def nan_to_inf(b_logit):
    """Logits whose max is +inf if any of them is NaN: a max by itself may pass over NaN."""
    return tl.where(b_logit < float("inf"), b_logit, float("inf"))


@triton.jit
def store_sums(partials_ptr, b_logit, scale, BLOCK_C: tl.constexpr):
    """Largest logit of a chunk, and the sum of exp((logit - largest) / temperature) beside it."""
    largest = tl.max(b_logit, 0)
    tl.store(partials_ptr, largest)
    tl.store(partials_ptr + BLOCK_C, tl.sum(weights_of(b_logit, largest, scale), 0))


@triton.jit(do_not_specialize=["num_draft_rows", "max_rows"])
def _rows_kernel(
    partials_ptr,  # [N, num_fields, BLOCK_C]: max and sum of p, max and sum of q; or max alone
    winners_ptr,  # [N, BLOCK_C] int32, first token that has the max
    logits_ptr,  # [N, V]
    draft_logits_ptr,  # [M, V], or None
    tokens_ptr,  # [N]
    row_start_loc_ptr,  # [R + 1]
    parents_ptr,  # [N], or None for chains
    temperature_ptr,  # [R], or None if all requests are greedy
    seeds_ptr,  # [R]
    positions_ptr,  # [N]
    draft_rows_ptr,  # [N], or None
    logits_stride,
    draft_logits_stride,
    num_fields,
    vocab_size,
    num_draft_rows,
    max_rows,
    IS_COUPLED: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of a request, padded to a power of two
    BLOCK_C: tl.constexpr,  # chunks, padded to a power of two
    BLOCK_V: tl.constexpr,  # tokens per chunk
):
    # Siblings may share a proposal: as neighbours in launch order they find it in the cache.
    node = tl.program_id(0)
    chunk = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    start, num_rows = rows_of_request(row_start_loc_ptr, request, max_rows)
    if node >= num_rows:
        return
    row = start + node
    token = tl.load(tokens_ptr + row)
    if (node > 0) & ((token < 0) | (token >= vocab_size)):
        return

    temperature = 0.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + request)
    partials_ptr += row * num_fields * BLOCK_C + chunk
    winners_ptr += row * BLOCK_C + chunk
    b_token = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    b_logit = load_logits(logits_ptr, row, logits_stride, b_token, vocab_size)
    if temperature > 0.0:
        if IS_COUPLED:
            seed = tl.load(seeds_ptr + request)
            position = tl.load(positions_ptr + row)
            b_logit = nan_to_inf(b_logit)
            best, winner = draw_by_logit(b_logit, temperature, b_token, seed, position, TARGET)
            tl.store(partials_ptr, best)
            tl.store(winners_ptr, winner)
        else:
            scale = exponent_scale(temperature)
            if draft_logits_ptr is None:
                store_sums(partials_ptr, b_logit, scale, BLOCK_C)
            else:
                _, _, b_parent = load_nodes(
                    tokens_ptr, parents_ptr, start, num_rows, vocab_size, BLOCK_R
                )
                has_child = tl.max((b_parent == node).to(tl.int32), 0) > 0
                source = proposal_of(draft_rows_ptr, row, num_draft_rows, has_child)
                b_draft = load_logits(
                    draft_logits_ptr, source, draft_logits_stride, b_token, vocab_size
                )
                # p's sums while q's logits, whose address took loads of its own, are on their way.
                store_sums(partials_ptr, b_logit, scale, BLOCK_C)
                store_sums(partials_ptr + 2 * BLOCK_C, b_draft, scale, BLOCK_C)
    else:
        best, winner = first_max(nan_to_inf(b_logit), b_token)
        tl.store(partials_ptr, best)
        tl.store(winners_ptr, winner)
