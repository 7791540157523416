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
from specformer_kernels.select_tree.reference import Beam, Tree, check_arguments, check_beam


@triton.jit
def _children(
    b_path,  # [BLOCK_W] float32, sums along the rows' paths
    log_probs_ptr,
    tokens_ptr,
    log_probs_stride,
    tokens_stride,
    beam,
    num_candidates,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums along the paths of one slot's children, [BLOCK_W, BLOCK_C]; -inf: never taken."""
    b_row = tl.arange(0, BLOCK_W)[:, None]
    b_candidate = tl.arange(0, BLOCK_C)[None, :]
    is_child = (b_row < beam) & (b_candidate < num_candidates)
    b_log_prob = tl.load(
        log_probs_ptr + b_row * log_probs_stride + b_candidate, mask=is_child, other=float("-inf")
    ).to(tl.float32)
    b_token = tl.load(tokens_ptr + b_row * tokens_stride + b_candidate, mask=is_child, other=-1)
    is_taken = (b_log_prob > float("-inf")) & (b_log_prob < float("inf")) & (b_token > -1)
    # A child that weighs more than its parent would be taken without it.
    b_sum = b_path[:, None] + tl.where(b_log_prob > 0.0, 0.0, b_log_prob)
    return tl.where(is_taken, b_sum, float("-inf"))


@triton.jit
def _extend_beam_kernel(
    out_tokens_ptr,  # [R, width] int64
    out_paths_ptr,  # [R, width] float32
    out_origins_ptr,  # [R, width] int64
    log_probs_ptr,  # [R, w, c]
    tokens_ptr,  # [R, w, c] int64
    paths_ptr,  # [R, w]
    beam,
    num_candidates,
    width,
    log_probs_stride_r,
    log_probs_stride_w,
    tokens_stride_r,
    tokens_stride_w,
    HAS_PATHS: tl.constexpr,
    BLOCK_W: tl.constexpr,  # >= w
    BLOCK_C: tl.constexpr,  # >= c
):
    request = tl.program_id(0).to(tl.int64)
    log_probs_ptr += request * log_probs_stride_r
    tokens_ptr += request * tokens_stride_r
    b_row = tl.arange(0, BLOCK_W)
    b_path = tl.where(b_row == 0, 0.0, float("-inf"))
    if HAS_PATHS:
        b_path = tl.load(
            paths_ptr + request * beam + b_row, mask=b_row < beam, other=float("-inf")
        ).to(tl.float32)
    b_sum = _children(
        b_path,
        log_probs_ptr,
        tokens_ptr,
        log_probs_stride_w,
        tokens_stride_w,
        beam,
        num_candidates,
        BLOCK_W,
        BLOCK_C,
    )
    b_child = b_row[:, None] * num_candidates + tl.arange(0, BLOCK_C)[None, :]
    b_key = tl.where(b_sum > float("-inf"), pack_keys(b_sum, b_child), NO_KEY)
    for rank in range(width):
        best = tl.max(tl.max(b_key, 1), 0)
        path = tl.max(tl.max(tl.where(b_key == best, b_sum, float("-inf")), 1), 0)
        b_key = tl.where(b_key == best, NO_KEY, b_key)
        is_alive = best > NO_KEY
        child = packed_index(best)
        at = child // num_candidates * tokens_stride_w + child % num_candidates
        out = request * width + rank
        tl.store(out_tokens_ptr + out, tl.load(tokens_ptr + at, mask=is_alive, other=0))
        tl.store(out_paths_ptr + out, tl.where(is_alive, path, float("-inf")))
        tl.store(out_origins_ptr + out, tl.where(is_alive, child, -1))


@triton.jit
def _select_tree_kernel(
    out_tokens_ptr,  # [R, num_nodes + 1] int64
    out_parents_ptr,  # [R, num_nodes + 1] int32
    out_depths_ptr,  # [R, num_nodes + 1] int32
    out_mask_ptr,  # [R, num_nodes + 1] int64
    log_probs_ptr,  # [R, K, w, c]
    tokens_ptr,  # [R, K, w, c] int64
    origins_ptr,  # [R, K, w] int64
    num_slots,
    beam,
    num_candidates,
    num_nodes,
    BLOCK_K: tl.constexpr,  # >= K
    BLOCK_W: tl.constexpr,  # >= w
    BLOCK_C: tl.constexpr,  # >= c
    BLOCK_N: tl.constexpr,  # >= num_nodes + 1
):
    request = tl.program_id(0).to(tl.int64)
    of_slot = beam * num_candidates
    log_probs_ptr += request * num_slots * of_slot
    tokens_ptr += request * num_slots * of_slot
    origins_ptr += request * num_slots * beam

    # Keys of all children: the sum along the path, and where the child stands.
    b_row = tl.arange(0, BLOCK_W)
    b_place = b_row[:, None] * num_candidates + tl.arange(0, BLOCK_C)[None, :]
    b_places = tl.reshape(b_place, [BLOCK_W * BLOCK_C])
    b_slot = tl.arange(0, BLOCK_K)
    b_keys = tl.full([BLOCK_K, BLOCK_W * BLOCK_C], NO_KEY, tl.int64)
    b_path = tl.where(b_row == 0, 0.0, float("-inf"))
    for slot in range(num_slots):
        first = slot * of_slot
        b_sum = _children(
            b_path,
            log_probs_ptr + first,
            tokens_ptr + first,
            num_candidates,
            num_candidates,
            beam,
            num_candidates,
            BLOCK_W,
            BLOCK_C,
        )
        b_key = tl.where(b_sum > float("-inf"), pack_keys(b_sum, first + b_place), NO_KEY)
        b_key = tl.reshape(b_key, [BLOCK_W * BLOCK_C])
        b_keys = tl.where(b_slot[:, None] == slot, b_key[None, :], b_keys)
        num_rows = tl.where(slot + 1 < num_slots, beam, 0)
        b_origin = tl.load(origins_ptr + (slot + 1) * beam + b_row, mask=b_row < num_rows, other=-1)
        # Places of the padding may have the number of a child; their sums are -inf.
        b_sums = tl.reshape(b_sum, [BLOCK_W * BLOCK_C])
        is_origin = b_origin[:, None] == b_places[None, :]
        b_path = tl.max(tl.where(is_origin, b_sums[None, :], float("-inf")), 1)

    b_node = tl.arange(0, BLOCK_N)
    b_chosen = tl.full([BLOCK_N], -1, tl.int64)  # slot * w * c + row * c + candidate
    for node in range(1, num_nodes + 1):
        best = tl.max(tl.max(b_keys, 1), 0)
        b_keys = tl.where(b_keys == best, NO_KEY, b_keys)
        is_new = (b_node == node) & (best > NO_KEY)
        b_chosen = tl.where(is_new, packed_index(best), b_chosen)

    # Rows in order of choice. A parent is found by its place.
    is_node = b_chosen > -1
    b_depth = tl.where(is_node, b_chosen // of_slot + 1, tl.where(b_node > 0, 1, 0))
    has_parent = is_node & (b_depth > 1)
    b_origin = tl.load(origins_ptr + b_chosen // num_candidates, mask=has_parent, other=0)
    b_above = tl.where(has_parent, (b_depth - 2) * of_slot + b_origin, -2)
    b_match = tl.where(b_above[:, None] == b_chosen[None, :], b_node[None, :], 0)
    b_parent = tl.max(b_match, 1)

    # The main chain: from the root on, the first child of the node before.
    b_main = tl.where(b_node == 0, 1, 0)
    tip = 0
    for _ in range(num_slots):
        # BLOCK_N, which is nobody's parent, where there is no child.
        tip = tl.min(tl.where(is_node & (b_parent == tip), b_node, BLOCK_N), 0)
        b_main = tl.where(b_node == tip, 1, b_main)
    is_behind = b_node[None, :] > b_node[:, None]
    b_ahead = tl.sum(tl.where(is_behind, b_main[None, :], 0), 1)
    b_new = tl.where(b_main > 0, b_depth.to(tl.int32), b_node + b_ahead)

    is_parent = b_parent[:, None] == b_node[None, :]
    b_new_parent = tl.sum(tl.where(is_parent, b_new[None, :], 0), 1)
    b_own = tl.full([BLOCK_N], 1, tl.int64) << b_new.to(tl.int64)
    b_word = b_own
    for _ in range(num_slots):
        b_above = tl.sum(tl.where(is_parent, b_word[None, :], 0), 1)
        b_word = b_own | tl.where(is_node, b_above, 0)

    is_row = b_node <= num_nodes
    out = request * (num_nodes + 1) + b_new
    b_token = tl.load(tokens_ptr + b_chosen, mask=is_node, other=-1)
    tl.store(out_tokens_ptr + out, b_token, mask=is_row)
    tl.store(out_parents_ptr + out, b_new_parent, mask=is_row)
    tl.store(out_depths_ptr + out, b_depth.to(tl.int32), mask=is_row)
    tl.store(out_mask_ptr + out, b_word, mask=is_row)


def tile_sizes(slots: int, beam: int, num_candidates: int, num_nodes: int) -> dict[str, int]:
    """Tile sizes and warps: one warp at ordinary sizes, so that no step needs a barrier."""
    sizes = {
        "BLOCK_K": triton.next_power_of_2(slots),
        "BLOCK_W": triton.next_power_of_2(beam),
        "BLOCK_C": triton.next_power_of_2(num_candidates),
        "BLOCK_N": triton.next_power_of_2(num_nodes + 1),
    }
    children = sizes["BLOCK_K"] * sizes["BLOCK_W"] * sizes["BLOCK_C"]
    most = max(children, sizes["BLOCK_N"] ** 2)
    return sizes | {"num_warps": min(8, max(1, most // 1024))}


def _check_dtype(log_probs: Tensor) -> None:
    if log_probs.dtype == torch.float64:
        raise ValueError("log_probs: the kernel adds in float32, found torch.float64")


def extend_beam(log_probs: Tensor, tokens: Tensor, paths: Tensor | None, width: int) -> Beam:
    """Launch the kernel: one program per request; no host sync.

    Shapes and dtypes as in `specformer_kernels.select_tree.extend_beam`; float64 is refused.
    """
    check_beam(log_probs, tokens, paths, width)
    _check_dtype(log_probs)
    requests, beam, num_candidates = log_probs.shape
    shape, device = (requests, width), log_probs.device
    found = Beam(
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
    )
    if requests:
        with torch.cuda.device_of(log_probs):
            _extend_beam_kernel[(requests,)](
                *found,
                log_probs,
                tokens,
                paths,
                beam,
                num_candidates,
                width,
                *log_probs.stride()[:2],
                *tokens.stride()[:2],
                HAS_PATHS=paths is not None,
                BLOCK_W=triton.next_power_of_2(beam),
                BLOCK_C=triton.next_power_of_2(num_candidates),
                num_warps=1,
            )
    return found


def select_tree(log_probs: Tensor, tokens: Tensor, origins: Tensor, num_nodes: int) -> Tree:
    """Launch the kernel: one program per request; no host sync.

    Shapes and dtypes as in `specformer_kernels.select_tree.select_tree`; float64 is refused.
    """
    check_arguments(log_probs, tokens, origins, num_nodes)
    _check_dtype(log_probs)
    requests, slots, beam, num_candidates = log_probs.shape
    shape, device = (requests, num_nodes + 1), log_probs.device
    tree = Tree(
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
    )
    if requests:
        with torch.cuda.device_of(log_probs):
            _select_tree_kernel[(requests,)](
                *tree,
                log_probs,
                tokens,
                origins,
                slots,
                beam,
                num_candidates,
                num_nodes,
                **tile_sizes(slots, beam, num_candidates, num_nodes),
            )
    return tree
