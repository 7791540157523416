"""Trees of drafted tokens in plain PyTorch: the oracle of the kernel and the path on CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A row's ancestors and itself are the bits of one int64 word; the root takes one.
MAX_NODES = 63
MAX_CANDIDATES = 16


class Tree(NamedTuple):
    """A tree per request, root first, parents before children; n drafted nodes."""

    tokens: Tensor  # [R, n + 1] int64; -1 at the root and at inert rows
    parents: Tensor  # [R, n + 1] int32, row within the request; 0 at the root
    depths: Tensor  # [R, n + 1] int32; 0 at the root
    mask: Tensor  # [R, n + 1] int64; bit j is set iff node j is the row itself or an ancestor


class FixedTree(NamedTuple):
    """A tree's shape, the same for every request; n drafted nodes in breadth-first order."""

    parents: Tensor  # [n + 1] int32; 0 at the root
    depths: Tensor  # [n + 1] int32; 0 at the root
    candidates: Tensor  # [n + 1] int64, which candidate of slot depth - 1; -1 at the root
    mask: Tensor  # [n + 1] int64; bit j is set iff node j is the row itself or an ancestor


def check_arguments(log_probs: Tensor, tokens: Tensor, num_nodes: int) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if log_probs.dim() != 3 or log_probs.shape[1] == 0:
        raise ValueError(
            f"log_probs: expected shape [R, K, c], K > 0, found {list(log_probs.shape)}"
        )
    if not log_probs.is_floating_point():
        raise ValueError(f"log_probs: expected a floating point dtype, found {log_probs.dtype}")
    if not 1 <= log_probs.shape[2] <= MAX_CANDIDATES:
        raise ValueError(
            f"log_probs: expected 1 to {MAX_CANDIDATES} candidates, found {log_probs.shape[2]}"
        )
    if tokens.shape != log_probs.shape:
        raise ValueError(
            f"tokens: expected log_probs' shape {list(log_probs.shape)}, found {list(tokens.shape)}"
        )
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected torch.int64, found {tokens.dtype}")
    for name, tensor in (("log_probs", log_probs), ("tokens", tokens)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, found {tensor.stride()}")
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"num_nodes: expected 1 to {MAX_NODES}, found {num_nodes}")


def select_tree(log_probs: Tensor, tokens: Tensor, num_nodes: int) -> Tree:
    """Best first, for all requests at once: every node offers its best child not yet taken.

    Shapes and dtypes as in `specformer_kernels.select_tree.select_tree`. Adds log-probabilities in
    float32, or in float64 if they come so.
    """
    check_arguments(log_probs, tokens, num_nodes)
    num_requests, _, num_candidates = log_probs.shape
    device, num_rows = log_probs.device, num_nodes + 1
    weights = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    weights = weights.masked_fill((tokens < 0) | ~weights.isfinite(), -math.inf)
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(-1, order)
    # A slot and a rank past the end, which offer nothing.
    weights = F.pad(weights, (0, 1, 0, 1), value=-math.inf).flatten(1)
    tokens = F.pad(tokens, (0, 1, 0, 1), value=-1).flatten(1)

    row = torch.arange(num_rows, device=device)
    request = torch.arange(num_requests, device=device)
    chosen = torch.full((num_requests, num_rows), -1, dtype=torch.int64, device=device)
    parents = torch.zeros_like(chosen)
    depths = (row > 0).long().expand(num_requests, -1).clone()
    mask = (torch.ones_like(row) << row).expand(num_requests, -1).clone()
    path = torch.full_like(chosen, -math.inf, dtype=weights.dtype)  # log-probability of the path
    path[:, 0] = 0.0
    next_rank = torch.zeros_like(chosen)
    for node in range(1, num_rows):
        child = depths * (num_candidates + 1) + next_rank  # [R, n + 1] into the flat lists
        offers = path + weights.gather(1, child)
        parent = offers.argmax(dim=1)  # the first of equal offers
        is_node = offers[request, parent] > -math.inf
        path[:, node] = offers[request, parent]
        chosen[:, node] = torch.where(is_node, tokens[request, child[request, parent]], -1)
        parents[:, node] = torch.where(is_node, parent, 0)
        depths[:, node] = torch.where(is_node, depths[request, parent] + 1, 1)
        mask[:, node] |= torch.where(is_node, mask[request, parent], 0)
        # Once nothing is offered nothing changes any more, and ranks stay inside the lists.
        next_rank[request, parent] += is_node.long()
    return Tree(chosen, parents.int(), depths.int(), mask)


def fixed_tree(widths: Sequence[int]) -> FixedTree:
    """The tree in which every node at depth i has the first widths[i] candidates of slot i.

    Widths 4, 2, 1, 1 give 4 + 8 + 8 + 8 nodes. The shape knows nothing of what is drawn, so that
    recursive rejection stays exact. A request's tokens are `tokens[depths - 1, candidates]` of its
    [K, c] candidates, but for the root.

    Raises:
        ValueError: a width is below 1, or the tree has more than 63 drafted nodes.
    """
    parents, depths, candidates, words = [0], [0], [-1], [1]
    level = range(1)
    for depth, width in enumerate(widths, start=1):
        if width < 1:
            raise ValueError(f"widths: expected at least 1 at each depth, found {list(widths)}")
        if len(parents) - 1 + len(level) * width > MAX_NODES:
            raise ValueError(f"widths: expected at most {MAX_NODES} nodes, found {list(widths)}")
        first = len(parents)
        for parent in level:
            for candidate in range(width):
                words.append(words[parent] | 1 << len(parents))
                parents.append(parent)
                depths.append(depth)
                candidates.append(candidate)
        level = range(first, len(parents))
    # Bit 63 is the sign of an int64.
    words = [word - (1 << 64) if word >> 63 else word for word in words]
    return FixedTree(
        torch.tensor(parents, dtype=torch.int32),
        torch.tensor(depths, dtype=torch.int32),
        torch.tensor(candidates, dtype=torch.int64),
        torch.tensor(words, dtype=torch.int64),
    )
