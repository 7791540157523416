"""Selecting a tree of drafted tokens in Triton. Imports triton: load this module only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.sample_candidates.triton_kernel import NO_KEY, pack_keys, packed_index
from specformer_kernels.select_tree.reference import Tree, check_arguments

# Above every packed key.
_ANY_KEY = tl.constexpr(2**63 - 1)


@triton.jit
def _best_candidate(
    log_probs_ptr,  # [K, c] of the request
    tokens_ptr,  # [K, c] int64 of the request
    slot,
    below,  # the packed key of the last candidate taken
    num_slots,
    num_candidates,
    BLOCK_C: tl.constexpr,
):
    """Packed key and log-probability of a slot's best candidate below a key; NO_KEY and -inf."""
    b_c = tl.arange(0, BLOCK_C)
    b_at = slot * num_candidates + b_c
    is_candidate = b_c < tl.where(slot < num_slots, num_candidates, 0)
    b_log_prob = tl.load(log_probs_ptr + b_at, mask=is_candidate, other=float("-inf"))
    b_token = tl.load(tokens_ptr + b_at, mask=is_candidate, other=-1)
    b_log_prob = b_log_prob.to(tl.float32)
    b_key = pack_keys(b_log_prob, b_c)
    is_finite = (b_log_prob > float("-inf")) & (b_log_prob < float("inf"))
    is_left = is_finite & (b_token > -1) & (b_key < below)
    key = tl.max(tl.where(is_left, b_key, NO_KEY), 0)
    b_best = tl.where(is_left & (b_key == key), b_log_prob, float("-inf"))
    return key, tl.max(b_best, 0)


@triton.jit
def _select_tree_kernel(
    out_tokens_ptr,  # [R, num_nodes + 1] int64
    out_parents_ptr,  # [R, num_nodes + 1] int32
    out_depths_ptr,  # [R, num_nodes + 1] int32
    out_mask_ptr,  # [R, num_nodes + 1] int64
    log_probs_ptr,  # [R, K, c]
    tokens_ptr,  # [R, K, c] int64
    num_slots,
    num_candidates,
    num_nodes,
    BLOCK_C: tl.constexpr,  # >= c
    BLOCK_N: tl.constexpr,  # >= num_nodes + 1
):
    request = tl.program_id(0).to(tl.int64)
    log_probs_ptr += request * num_slots * num_candidates
    tokens_ptr += request * num_slots * num_candidates

    b_row = tl.arange(0, BLOCK_N)
    b_parent = tl.zeros([BLOCK_N], tl.int32)
    b_depth = tl.where(b_row > 0, 1, 0)
    b_word = tl.full([BLOCK_N], 1, tl.int64) << b_row.to(tl.int64)
    b_taken = tl.full([BLOCK_N], -1, tl.int32)  # slot * c + candidate
    # What each node offers: its best child that is not in the tree yet.
    b_path = tl.where(b_row == 0, 0.0, float("-inf"))
    key, log_prob = _best_candidate(
        log_probs_ptr, tokens_ptr, 0, _ANY_KEY, num_slots, num_candidates, BLOCK_C
    )
    b_key = tl.where(b_row == 0, key, NO_KEY)
    b_offer = tl.where(b_row == 0, log_prob, float("-inf"))

    for node in range(1, num_nodes + 1):
        # The largest offer, that of the lowest row among equals.
        best = tl.max(pack_keys(b_offer, b_row), 0)
        parent = packed_index(best).to(tl.int32)
        is_parent = b_row == parent
        path = tl.max(tl.where(is_parent, b_offer, float("-inf")), 0)
        depth = tl.sum(tl.where(is_parent, b_depth, 0), 0)
        word = tl.sum(tl.where(is_parent, b_word, 0), 0)
        parent_path = tl.max(tl.where(is_parent, b_path, float("-inf")), 0)
        taken = tl.max(tl.where(is_parent, b_key, NO_KEY), 0)

        # Nothing is offered any more once the best offer is -inf: no row changes.
        is_node = b_row == tl.where(path > float("-inf"), node, -1)
        is_parent = b_row == tl.where(path > float("-inf"), parent, -1)
        b_parent = tl.where(is_node, parent, b_parent)
        b_depth = tl.where(is_node, depth + 1, b_depth)
        b_word = tl.where(is_node, b_word | word, b_word)
        index = depth * num_candidates + packed_index(taken).to(tl.int32)
        b_taken = tl.where(is_node, index, b_taken)
        b_path = tl.where(is_node, path, b_path)

        key, log_prob = _best_candidate(
            log_probs_ptr, tokens_ptr, depth, taken, num_slots, num_candidates, BLOCK_C
        )
        b_key = tl.where(is_parent, key, b_key)
        b_offer = tl.where(is_parent, parent_path + log_prob, b_offer)
        key, log_prob = _best_candidate(
            log_probs_ptr, tokens_ptr, depth + 1, _ANY_KEY, num_slots, num_candidates, BLOCK_C
        )
        b_key = tl.where(is_node, key, b_key)
        b_offer = tl.where(is_node, path + log_prob, b_offer)

    is_row = b_row <= num_nodes
    out = request * (num_nodes + 1) + b_row
    is_taken = is_row & (b_taken > -1)
    tl.store(
        out_tokens_ptr + out, tl.load(tokens_ptr + b_taken, mask=is_taken, other=-1), mask=is_row
    )
    tl.store(out_parents_ptr + out, b_parent, mask=is_row)
    tl.store(out_depths_ptr + out, b_depth, mask=is_row)
    tl.store(out_mask_ptr + out, b_word, mask=is_row)


def tile_sizes(num_candidates: int, num_nodes: int) -> dict[str, int]:
    """Tile sizes and warps: one warp holds the whole tree, so that no step needs a barrier."""
    return {
        "BLOCK_C": triton.next_power_of_2(num_candidates),
        "BLOCK_N": triton.next_power_of_2(num_nodes + 1),
        "num_warps": 1,
    }


def select_tree(log_probs: Tensor, tokens: Tensor, num_nodes: int) -> Tree:
    """Launch the kernel: one program per request; no host sync.

    Shapes and dtypes as in `specformer_kernels.select_tree.select_tree`; float64 is refused.
    """
    check_arguments(log_probs, tokens, num_nodes)
    if log_probs.dtype == torch.float64:
        raise ValueError("log_probs: the kernel adds in float32, found torch.float64")
    num_requests, num_slots, num_candidates = log_probs.shape
    shape, device = (num_requests, num_nodes + 1), log_probs.device
    tree = Tree(
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
    )
    if num_requests:
        with torch.cuda.device_of(log_probs):
            _select_tree_kernel[(num_requests,)](
                *tree,
                log_probs,
                tokens,
                num_slots,
                num_candidates,
                num_nodes,
                **tile_sizes(num_candidates, num_nodes),
            )
    return tree
