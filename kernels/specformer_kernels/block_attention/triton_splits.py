"""How a batch's context is cut into splits of work, inside the kernels. Imports triton.

A split is a run of one request's context that one program reads. The longest split follows from the
batch's total, so that no program has much more to read than another, whatever the lengths are. All
of it is computed from `context_lens` on the device: a captured launch follows the lengths.
"""

# Device functions' arguments are untyped but for constexprs, upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_lens(context_lens_ptr, b_request, num_requests, VISIBLE: tl.constexpr):
    """int32 context tokens that are seen, at most VISIBLE of them if it is not 0.

    0 past the last request, and for a padding row's negative length.
    """
    b_len = tl.load(context_lens_ptr + b_request, mask=b_request < num_requests, other=0)
    b_len = tl.maximum(b_len, 0).to(tl.int32)
    if VISIBLE:
        b_len = tl.minimum(b_len, VISIBLE)
    return b_len


@triton.jit
def longest_split(
    context_lens_ptr,  # [R]
    num_requests,
    target_splits,  # splits that the context of the whole batch should make
    MIN_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # requests per step
    VISIBLE: tl.constexpr,
):
    """Tokens of the longest split, a multiple of BLOCK_N and not below MIN_TOKENS."""
    b_r = tl.arange(0, BLOCK_R)
    b_total = tl.zeros((BLOCK_R,), dtype=tl.int64)
    for first in range(0, num_requests, BLOCK_R):
        b_total += load_lens(context_lens_ptr, first + b_r, num_requests, VISIBLE).to(tl.int64)
    tokens = tl.cdiv(tl.sum(b_total, 0), target_splits).to(tl.int32)
    return tl.cdiv(tl.maximum(tokens, MIN_TOKENS), BLOCK_N) * BLOCK_N


@triton.jit
def find_split(
    index,
    split_tokens,  # of the longest split
    context_lens_ptr,  # [R]
    num_requests,
    ONLY_SPLIT: tl.constexpr,  # count the splits of split requests only
    BLOCK_R: tl.constexpr,
    VISIBLE: tl.constexpr,
):
    """Request of split `index`, which of the request's splits it is, and its partial result.

    Every request has a split, also one without context. The request is num_requests where `index`
    is past the last split. Only the splits of split requests, those with several, have a partial
    result; these are numbered in the order of the splits.
    """
    b_r = tl.arange(0, BLOCK_R)
    request = tl.full((), 0, tl.int32)
    first_split = tl.full((), 0, tl.int32)
    first_partial = tl.full((), 0, tl.int32)
    num_splits = tl.full((), 0, tl.int32)
    for first in range(0, num_requests, BLOCK_R):
        b_request = first + b_r
        is_request = b_request < num_requests
        b_len = load_lens(context_lens_ptr, b_request, num_requests, VISIBLE)
        b_splits = tl.cdiv(b_len, split_tokens)
        b_partials = tl.where(b_splits > 1, b_splits, 0)
        b_splits = tl.where(is_request, tl.maximum(b_splits, 1), 0)
        if ONLY_SPLIT:
            b_splits = b_partials
        is_earlier = is_request & (num_splits + tl.cumsum(b_splits, 0) <= index)
        request += tl.sum(is_earlier.to(tl.int32), 0)
        first_split += tl.sum(tl.where(is_earlier, b_splits, 0), 0)
        first_partial += tl.sum(tl.where(is_earlier, b_partials, 0), 0)
        num_splits += tl.sum(b_splits, 0)
    part = index - first_split
    return request.to(tl.int64), part, (first_partial + part).to(tl.int64)
