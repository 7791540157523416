"""What the random tests of a request's nodes need to know, whatever path is taken."""

# Arguments of kernels and device functions are untyped but for constexprs, upper case by Triton's
# custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.verify.rules import NEGLIGIBLE as _NEGLIGIBLE
from specformer_kernels.verify.triton_draw import exponent_scale
from specformer_kernels.verify.triton_rows import load_nodes, proposal_of, rows_of_request
from specformer_kernels.verify.triton_walk import (
    load_partials,
    of_parent,
    sum_before,
    value_at,
)

NEGLIGIBLE = tl.constexpr(_NEGLIGIBLE)


@triton.jit
def row_sums(
    partials_ptr,  # [N, num_fields, BLOCK_C]
    field,  # of the chunks' max; their sums follow
    num_fields,
    num_chunks,
    rows,
    is_row,
    scale,
    BLOCK_C: tl.constexpr,
):
    """Max and sum of exp((logit - max) / temperature) of rows; sum 0 where none can be sampled."""
    b_max = load_partials(
        partials_ptr, rows, is_row, field, num_fields, num_chunks, float("-inf"), BLOCK_C
    )
    b_sum = load_partials(
        partials_ptr, rows, is_row, field + 1, num_fields, num_chunks, 0.0, BLOCK_C
    )
    row_max = tl.max(b_max, 1)
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(b_sum * tl.exp2((b_max - base[:, None]) * scale), 1)
    is_usable = row_sum > 0.0  # false for NaN
    return tl.where(is_usable, row_max, 0.0), tl.where(is_usable, row_sum, 0.0)


@triton.jit
def token_chances(
    logits_ptr,  # [rows, V]
    stride,
    sources,  # [nodes] row that decides on the node; negative: none
    b_token,
    b_parent,
    row_max,  # [nodes] of each node's own row
    row_sum,
    scale,
):
    """Softmax of each node's token in its parent's distribution; 0 where there is none."""
    total = of_parent(row_sum, b_parent)
    mask = (b_parent >= 0) & (sources >= 0) & (total > 0.0)
    b_logit = tl.load(logits_ptr + sources * stride + b_token, mask=mask, other=float("-inf"))
    weight = tl.exp2((b_logit.to(tl.float32) - of_parent(row_max, b_parent)) * scale)
    return tl.where(mask, weight / tl.where(mask, total, 1.0), 0.0)


@triton.jit
def keep_tried(
    b_node,
    b_token,
    b_parent,
    b_q,
    num_rows,
    IS_CHAIN: tl.constexpr,
    IS_DISTINCT: tl.constexpr,  # a parent tries each token once
    MAX_CHILDREN: tl.constexpr,
):
    """Parents, -1 for nodes that are never tried; and how many siblings are tried before each."""
    b_parent = tl.where(b_q >= NEGLIGIBLE, b_parent, -1)
    b_rank = tl.full(b_node.shape, 0, tl.int32)
    if not IS_CHAIN:
        b_one = tl.full(b_node.shape, 1, tl.int32)
        if IS_DISTINCT:
            b_key = b_parent.to(tl.int64) * (2**32) + b_token
            is_new = sum_before(b_one, b_key, b_key, b_node, num_rows) == 0
            b_parent = tl.where(is_new, b_parent, -1)
        b_rank = sum_before(b_one, b_parent, b_parent, b_node, num_rows)
        b_parent = tl.where(b_rank < MAX_CHILDREN, b_parent, -1)
    return b_parent, b_rank


@triton.jit
def judge_nodes(
    partials_ptr,  # [N, num_fields, BLOCK_C]
    logits_ptr,  # [N, V]
    draft_logits_ptr,  # [M, V], or None
    draft_rows_ptr,  # [N], or None
    logits_stride,
    draft_logits_stride,
    num_draft_rows,
    num_fields,
    num_chunks,
    b_node,
    b_token,
    b_parent,
    start,
    num_rows,
    scale,
    IS_CHAIN: tl.constexpr,
    IS_DISTINCT: tl.constexpr,
    MAX_CHILDREN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Parents and ranks as of `keep_tried`, p and q of the nodes' tokens at their parents, and max
    and sum of each row's p and q. Without proposals q is 1 at every token.
    """
    rows, is_row = start + b_node, b_node < num_rows
    sources = start + tl.maximum(b_parent, 0)
    p_max, p_sum = row_sums(partials_ptr, 0, num_fields, num_chunks, rows, is_row, scale, BLOCK_C)
    b_p = token_chances(logits_ptr, logits_stride, sources, b_token, b_parent, p_max, p_sum, scale)
    q_max, q_sum = p_max, tl.full(p_sum.shape, 1.0, tl.float32)
    b_q = q_sum
    if draft_logits_ptr is not None:
        q_max, q_sum = row_sums(
            partials_ptr, 2, num_fields, num_chunks, rows, is_row, scale, BLOCK_C
        )
        sources = proposal_of(draft_rows_ptr, sources, num_draft_rows, b_parent >= 0)
        b_q = token_chances(
            draft_logits_ptr, draft_logits_stride, sources, b_token, b_parent, q_max, q_sum, scale
        )
    b_parent, b_rank = keep_tried(
        b_node, b_token, b_parent, b_q, num_rows, IS_CHAIN, IS_DISTINCT, MAX_CHILDREN
    )
    return b_parent, b_rank, b_p, b_q, p_max, p_sum, q_max, q_sum


@triton.jit
def joint_ratios(b_p, b_q, b_node, num_rows):
    """P of block verification: P_i = min(1, P_{i-1} * p / q), P_0 = 1."""
    b_ratio = b_p / tl.maximum(b_q, NEGLIGIBLE)
    joint = 1.0
    b_joint = tl.where(b_node == 0, 1.0, 0.0)
    for node in range(1, num_rows):
        joint = tl.minimum(1.0, joint * value_at(b_ratio, b_node, node))
        b_joint = tl.where(b_node == node, joint, b_joint)
    return b_joint


@triton.jit(do_not_specialize=["num_draft_rows", "max_rows"])
def _nodes_kernel(
    sums_ptr,  # [N, 4] max and sum of p, max and sum of q
    taken_ptr,  # [N] b of the rules when the node is tried: how many times q is off p
    round_ptr,  # [N] int32, round in which the node's mass is taken; 0: never
    previous_ptr,  # [N] int32, sibling tried right before; 0: none
    partials_ptr,  # [N, 4, BLOCK_C]
    logits_ptr,  # [N, V]
    draft_logits_ptr,  # [M, V]
    tokens_ptr,  # [N]
    row_start_loc_ptr,  # [R + 1]
    parents_ptr,  # [N], or None for chains
    temperature_ptr,  # [R]
    draft_rows_ptr,  # [N]
    logits_stride,
    draft_logits_stride,
    num_draft_rows,
    num_fields,
    num_chunks,
    vocab_size,
    max_rows,
    IS_BLOCK: tl.constexpr,
    IS_DISTINCT: tl.constexpr,
    MAX_CHILDREN: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of a request, padded to a power of two
    BLOCK_C: tl.constexpr,  # chunks, padded to a power of two
):
    request = tl.program_id(0).to(tl.int64)
    start, num_rows = rows_of_request(row_start_loc_ptr, request, max_rows)
    b_node, b_token, b_parent = load_nodes(
        tokens_ptr, parents_ptr, start, num_rows, vocab_size, BLOCK_R
    )
    rows, is_row = start + b_node, b_node < num_rows
    b_taken = tl.full([BLOCK_R], 0.0, tl.float32)
    b_round = tl.full([BLOCK_R], 0, tl.int32)
    b_previous = b_round
    temperature = tl.load(temperature_ptr + request)
    if temperature > 0.0:
        b_parent, b_rank, b_p, b_q, p_max, p_sum, q_max, q_sum = judge_nodes(
            partials_ptr,
            logits_ptr,
            draft_logits_ptr,
            draft_rows_ptr,
            logits_stride,
            draft_logits_stride,
            num_draft_rows,
            num_fields,
            num_chunks,
            b_node,
            b_token,
            b_parent,
            start,
            num_rows,
            exponent_scale(temperature),
            parents_ptr is None,
            IS_DISTINCT,
            MAX_CHILDREN,
            BLOCK_C,
        )
        tl.store(sums_ptr + rows * 4, p_max, mask=is_row)
        tl.store(sums_ptr + rows * 4 + 1, p_sum, mask=is_row)
        tl.store(sums_ptr + rows * 4 + 2, q_max, mask=is_row)
        tl.store(sums_ptr + rows * 4 + 3, q_sum, mask=is_row)
        if IS_BLOCK:
            b_joint = joint_ratios(b_p, b_q, b_node, num_rows)
            b_taken = 1.0 / tl.maximum(of_parent(b_joint, b_parent), NEGLIGIBLE)
            b_round = ((b_node > 1) & (b_parent >= 0)).to(tl.int32)
        else:
            b_round = tl.where(b_parent >= 0, b_rank, 0)
            b_key = b_parent * BLOCK_R + b_rank
            b_previous = sum_before(b_node, b_key, b_key - 1, b_node, num_rows)
    tl.store(taken_ptr + rows, b_taken, mask=is_row)
    tl.store(round_ptr + rows, b_round, mask=is_row)
    tl.store(previous_ptr + rows, b_previous, mask=is_row)
