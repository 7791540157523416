"""The rules that accept at random: the path and what to draw its last token from."""

# Arguments of kernels and device functions are untyped but for constexprs, upper case by Triton's
# custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from specformer_kernels.noise import Stream
from specformer_kernels.noise import triton_functions as noise
from specformer_kernels.verify.triton_draw import exponent_scale
from specformer_kernels.verify.triton_mass import charge
from specformer_kernels.verify.triton_nodes import NEGLIGIBLE, joint_ratios, judge_nodes
from specformer_kernels.verify.triton_rows import load_nodes, rows_of_request
from specformer_kernels.verify.triton_walk import (
    best_tokens,
    load_partials,
    path_of,
    store_followed,
    store_path,
    sum_before,
    value_at,
)

ACCEPT = tl.constexpr(int(Stream.ACCEPT))


@triton.jit
def accept_one_hot(b_uniform, b_node, b_parent, b_p, num_rows):
    """Nodes accepted with their share of what the siblings before them have left of p."""
    b_left = 1.0 - sum_before(b_p, b_parent, b_parent, b_node, num_rows)
    is_open = b_left >= NEGLIGIBLE
    return is_open & (b_uniform <= b_p / tl.where(is_open, b_left, 1.0))


@triton.jit
def load_left(
    mass_ptr,  # [N, 2, BLOCK_C]
    rows,
    is_later,  # nodes that are not the first to be tried
    field,
    num_chunks,
    BLOCK_C: tl.constexpr,
):
    """What is left of p or of q when each node is tried: 1 before any rejection."""
    b_mass = load_partials(mass_ptr, rows, is_later, field, 2, num_chunks, 0.0, BLOCK_C)
    return tl.where(is_later, tl.sum(b_mass, 1), 1.0)


@triton.jit
def accept_recursively(
    mass_ptr,  # [N, 2, BLOCK_C]
    taken_ptr,  # [N]
    rows,
    b_uniform,
    b_parent,
    b_rank,
    b_p,
    b_q,
    num_chunks,
    IS_DISTINCT: tl.constexpr,
    MAX_CHILDREN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Nodes accepted if those tried before them are not; and b once a node is rejected."""
    b_taken = tl.full(b_p.shape, 0.0, tl.float32)
    p_left, q_left = b_taken + 1.0, b_taken + 1.0
    if MAX_CHILDREN > 1:
        is_later = (b_parent >= 0) & (b_rank > 0)
        b_taken = tl.load(taken_ptr + rows, mask=is_later, other=0.0)
        p_left = load_left(mass_ptr, rows, is_later, 0, num_chunks, BLOCK_C)
        if IS_DISTINCT:
            q_left = load_left(mass_ptr, rows, is_later, 1, num_chunks, BLOCK_C)
    is_open = tl.minimum(p_left, q_left) >= NEGLIGIBLE
    b_share = tl.maximum(b_p - b_taken * b_q, 0.0) / tl.maximum(b_q, NEGLIGIBLE)
    b_chance = b_share * (q_left / tl.maximum(p_left, NEGLIGIBLE))
    return is_open & (b_uniform <= b_chance), b_taken + charge(p_left, q_left)


@triton.jit
def keep_block(
    mass_ptr,  # [N, 2, BLOCK_C]
    rows,
    b_uniform,
    b_node,
    b_parent,
    b_joint,
    num_chunks,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The last node that block verification keeps, b there, and the drafts it looked at."""
    length = tl.min(tl.where((b_node > 0) & (b_parent < 0), b_node, BLOCK_R), 0) - 1
    # What a row's distribution leaves is stored with the node below the row.
    is_inner = (b_node > 0) & (b_node < length)
    b_mass = b_joint * load_left(mass_ptr, rows + 1, is_inner, 0, num_chunks, BLOCK_C)
    b_both = b_mass + (1.0 - b_joint)
    b_chance = tl.where(b_both > 0.0, b_mass / tl.where(b_both > 0.0, b_both, 1.0), 1.0)
    is_kept = (b_node > 0) & (b_node <= length) & (b_uniform <= b_chance)
    last = tl.max(tl.where(is_kept, b_node, 0), 0)
    taken = 1.0 / tl.maximum(value_at(b_joint, b_node, last), NEGLIGIBLE)
    return last, tl.where(last < length, taken, 0.0), length


@triton.jit(do_not_specialize=["num_draft_rows", "max_rows"])
def _decide_kernel(
    out_tokens_ptr,  # [R, max_rows] int64
    num_tokens_ptr,  # [R] int32
    out_rows_ptr,  # [R, max_rows] int64
    draw_rows_ptr,  # [R] int64, row to draw the last token from; -1: none
    draw_weights_ptr,  # [R, 3] max of p, max of q, factor on q's weights before they are taken
    partials_ptr,  # [N, num_fields, BLOCK_C]
    winners_ptr,  # [N, BLOCK_C]
    mass_ptr,  # [N, 2, BLOCK_C], or None if no node needs it
    taken_ptr,  # [N], likewise
    logits_ptr,  # [N, V]
    draft_logits_ptr,  # [M, V], or None
    tokens_ptr,  # [N]
    row_start_loc_ptr,  # [R + 1]
    parents_ptr,  # [N], or None for chains
    temperature_ptr,  # [R]
    seeds_ptr,  # [R]
    positions_ptr,  # [N]
    draft_rows_ptr,  # [N], or None
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
    rows = start + b_node
    out = out_tokens_ptr, num_tokens_ptr, out_rows_ptr
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
        position = tl.load(positions_ptr + start, mask=num_rows > 0, other=0)
        b_uniform = noise.uniform(tl.load(seeds_ptr + request), position, b_node, ACCEPT)
        if IS_BLOCK:
            b_joint = joint_ratios(b_p, b_q, b_node, num_rows)
            last, taken, length = keep_block(
                mass_ptr, rows, b_uniform, b_node, b_parent, b_joint, num_chunks, BLOCK_R, BLOCK_C
            )
            b_is_on, b_depth, b_is_read = b_node <= last, b_node, b_node <= length
        else:
            b_after = tl.full([BLOCK_R], 0.0, tl.float32)
            if draft_logits_ptr is None:
                b_accepted = accept_one_hot(b_uniform, b_node, b_parent, b_p, num_rows)
            else:
                b_accepted, b_after = accept_recursively(
                    mass_ptr,
                    taken_ptr,
                    rows,
                    b_uniform,
                    b_parent,
                    b_rank,
                    b_p,
                    b_q,
                    num_chunks,
                    IS_DISTINCT,
                    MAX_CHILDREN,
                    BLOCK_C,
                )
            b_is_on, b_depth = path_of(b_accepted, b_node, b_parent, num_rows)
            b_is_read = b_is_on
            last = tl.max(tl.where(b_is_on, b_node, 0), 0)
            # b grows from sibling to sibling: the largest is that after all of them.
            taken = tl.max(tl.where(b_parent == last, b_after, 0.0), 0)
        is_usable = tl.sum((b_is_read & (p_sum == 0.0)).to(tl.int32), 0) == 0
        ratio = value_at(p_sum, b_node, last) / tl.maximum(value_at(q_sum, b_node, last), 1.0)
        draw_weights_ptr += request * 3
        tl.store(draw_rows_ptr + request, tl.where(is_usable, start + last, -1))
        tl.store(draw_weights_ptr, value_at(p_max, b_node, last))
        tl.store(draw_weights_ptr + 1, value_at(q_max, b_node, last))
        tl.store(draw_weights_ptr + 2, taken * ratio)
        store_path(out, b_node, b_token, b_depth, b_is_on, is_usable, -1, request, start, max_rows)
    else:
        tl.store(draw_rows_ptr + request, -1)
        is_row = b_node < num_rows
        b_sampled = best_tokens(
            partials_ptr, winners_ptr, rows, is_row, num_fields, num_chunks, BLOCK_C
        )
        store_followed(
            out, b_sampled, b_node, b_token, b_parent, request, start, num_rows, max_rows
        )
