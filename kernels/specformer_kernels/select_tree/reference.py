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
MAX_BEAM = 8
MAX_SLOTS = 64


class Tree(NamedTuple):
    """A tree per request, root first, parents before children; n drafted nodes."""

    tokens: Tensor  # [R, n + 1] int64; -1 at the root and at inert rows
    parents: Tensor  # [R, n + 1] int32, row within the request; 0 at the root
    depths: Tensor  # [R, n + 1] int32; 0 at the root
    mask: Tensor  # [R, n + 1] int64; bit j is set iff node j is the row itself or an ancestor


class Beam(NamedTuple):
    """A slot's rows: the best of the children of the slot before; w rows."""

    tokens: Tensor  # [R, w] int64; 0 of a dead row, so that it may be looked up
    paths: Tensor  # [R, w] float32 (float64 of float64), the sum along the path; -inf of a dead row
    origins: Tensor  # [R, w] int64, number of the child, row times c plus candidate; -1 if dead


class FixedTree(NamedTuple):
    """A tree's shape, the same for every request; n drafted nodes in breadth-first order."""

    parents: Tensor  # [n + 1] int32; 0 at the root
    depths: Tensor  # [n + 1] int32; 0 at the root
    candidates: Tensor  # [n + 1] int64, which candidate of slot depth - 1; -1 at the root
    mask: Tensor  # [n + 1] int64; bit j is set iff node j is the row itself or an ancestor


def check_lists(log_probs: Tensor, tokens: Tensor, shape: str) -> None:
    """Raise ValueError where two lists of candidates of `shape`, such as "R, w, c", do not fit."""
    expected = f"[{shape}]"
    if log_probs.dim() != len(shape.split(", ")) or not all(log_probs.shape[1:]):
        raise ValueError(
            f"log_probs: expected shape {expected}, only R may be 0, found {list(log_probs.shape)}"
        )
    if not log_probs.is_floating_point():
        raise ValueError(f"log_probs: expected a floating point dtype, found {log_probs.dtype}")
    if log_probs.shape[-1] > MAX_CANDIDATES:
        raise ValueError(
            f"log_probs: expected 1 to {MAX_CANDIDATES} candidates, found {log_probs.shape[-1]}"
        )
    if log_probs.shape[-2] > MAX_BEAM:
        raise ValueError(f"log_probs: expected 1 to {MAX_BEAM} rows, found {log_probs.shape[-2]}")
    if tokens.shape != log_probs.shape:
        raise ValueError(
            f"tokens: expected log_probs' shape {list(log_probs.shape)}, found {list(tokens.shape)}"
        )
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected torch.int64, found {tokens.dtype}")


def check_beam(log_probs: Tensor, tokens: Tensor, paths: Tensor | None, width: int) -> None:
    """Raise ValueError, naming the argument, where `extend_beam`'s contract is broken."""
    check_lists(log_probs, tokens, "R, w, c")
    for name, tensor in (("log_probs", log_probs), ("tokens", tokens)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, found {tensor.stride()}"
            )
    if paths is not None:
        if paths.shape != log_probs.shape[:2]:
            raise ValueError(
                f"paths: expected shape {list(log_probs.shape[:2])}, found {list(paths.shape)}"
            )
        if paths.dtype not in (log_probs.dtype, torch.float32):
            raise ValueError(f"paths: expected {log_probs.dtype}, found {paths.dtype}")
        if not paths.is_contiguous():
            raise ValueError(f"paths: expected a contiguous tensor, found {paths.stride()}")
    if not 1 <= width <= MAX_BEAM:
        raise ValueError(f"width: expected 1 to {MAX_BEAM}, found {width}")


def check_arguments(log_probs: Tensor, tokens: Tensor, origins: Tensor, num_nodes: int) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if log_probs.dim() == 4 and log_probs.shape[1] > MAX_SLOTS:
        raise ValueError(f"log_probs: expected 1 to {MAX_SLOTS} slots, found {log_probs.shape[1]}")
    check_lists(log_probs, tokens, "R, K, w, c")
    if origins.shape != log_probs.shape[:3]:
        raise ValueError(
            f"origins: expected shape {list(log_probs.shape[:3])}, found {list(origins.shape)}"
        )
    if origins.dtype != torch.int64:
        raise ValueError(f"origins: expected torch.int64, found {origins.dtype}")
    for name, tensor in (("log_probs", log_probs), ("tokens", tokens), ("origins", origins)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, found {tensor.stride()}")
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"num_nodes: expected 1 to {MAX_NODES}, found {num_nodes}")


def _first_rows(log_probs: Tensor) -> Tensor:
    """Paths of slot 0's rows, [R, w] of log_probs [R, ..., w, c]: row 0 lives, at 0."""
    paths = log_probs.new_full((log_probs.shape[0], log_probs.shape[-2]), -math.inf)
    paths[:, 0] = 0.0
    return paths


def _children(paths: Tensor, log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The sums along the children's paths, -inf of those never taken: [R, w * c]."""
    sums = paths[..., None] + log_probs.clamp(max=0.0)
    return sums.masked_fill((tokens < 0) | ~log_probs.isfinite(), -math.inf).flatten(1)


def _widened(log_probs: Tensor) -> Tensor:
    return log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))


def extend_beam(log_probs: Tensor, tokens: Tensor, paths: Tensor | None, width: int) -> Beam:
    """Sort all children of every request.

    Shapes and dtypes as in `specformer_kernels.select_tree.extend_beam`. Adds log-probabilities in
    float32, or in float64 if they come so.
    """
    check_beam(log_probs, tokens, paths, width)
    weights = _widened(log_probs)
    paths = _first_rows(weights) if paths is None else paths.to(weights.dtype)
    best, child = _best(_children(paths, weights, tokens), width)
    is_dead = best == -math.inf
    return Beam(
        tokens.flatten(1).gather(1, child).masked_fill(is_dead, 0),
        best,
        child.masked_fill(is_dead, -1),
    )


def _best(sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of [R, N], the first of equal ones first, and where: [R, count], filled up."""
    best, where = sums.sort(dim=1, descending=True, stable=True)
    missing = max(0, count - sums.shape[1])
    best = F.pad(best[:, :count], (0, missing), value=-math.inf)
    return best, F.pad(where[:, :count], (0, missing))


def select_tree(log_probs: Tensor, tokens: Tensor, origins: Tensor, num_nodes: int) -> Tree:
    """Sum along all paths, slot by slot, sort, and follow the parents; for all requests at once.

    Shapes and dtypes as in `specformer_kernels.select_tree.select_tree`. Adds log-probabilities in
    float32, or in float64 if they come so.
    """
    check_arguments(log_probs, tokens, origins, num_nodes)
    requests, slots, beam, count = log_probs.shape
    device, of_slot = log_probs.device, beam * count
    weights = _widened(log_probs)
    paths = _first_rows(weights)
    sums: list[Tensor] = []
    for level in range(slots):
        if level:
            origin = origins[:, level]
            is_dead = (origin < 0) | (origin >= of_slot)
            paths = sums[-1].gather(1, origin.clamp(0, of_slot - 1)).masked_fill(is_dead, -math.inf)
        sums.append(_children(paths, weights[:, level], tokens[:, level]))
    best, child = _best(torch.cat(sums, dim=1), num_nodes)  # [R, n], child: slot * w * c + place

    # Rows in order of choice, the root first; child -1 at the root and at inert rows.
    child = F.pad(child.masked_fill(best == -math.inf, -1), (1, 0), value=-1)
    is_node = child >= 0
    row = torch.arange(num_nodes + 1, device=device).expand(requests, -1)
    chosen = torch.zeros((requests, slots * of_slot + 1), dtype=torch.int64, device=device)
    chosen.scatter_(1, child.clamp(min=-1) % (slots * of_slot + 1), row)  # -1: the last column
    slot = child.clamp(min=0) // of_slot
    origin = origins.flatten(1).gather(1, child.clamp(min=0) // count)
    above = (slot - 1) * of_slot + origin
    has_parent = is_node & (slot > 0)
    parent = chosen.gather(1, torch.where(has_parent, above, 0)).masked_fill(~has_parent, 0)

    # The first child of every node is its best. A node is on the main chain if it is one and all
    # that it descends from are.
    siblings = parent[:, :, None] == parent[:, None, :]  # [R, n + 1, n + 1]
    earlier = torch.ones_like(siblings[:1]).tril(-1) & is_node[:, None, :]
    is_first = is_node & ~(siblings & earlier).any(-1)
    others = (_bit(row) * (is_node & ~is_first)).sum(1, keepdim=True)
    is_main = is_node & (_words(parent, row, is_node, slots) & others == 0)
    ahead = is_main.sum(1, keepdim=True) - is_main.cumsum(1)  # of the main chain, behind a row
    depth = slot + 1
    place = torch.where(is_main, depth, torch.where(row > 0, row + ahead, 0))

    def placed(values: Tensor) -> Tensor:
        return torch.empty_like(values).scatter_(1, place, values)

    parents, is_node = placed(place.gather(1, parent)), placed(is_node)
    found = tokens.flatten(1).gather(1, child.clamp(min=0)).masked_fill(child < 0, -1)
    return Tree(
        placed(found),
        parents.int(),
        placed(depth * (row > 0)).int(),
        _words(parents, row, is_node, slots),
    )


def _bit(row: Tensor) -> Tensor:
    return torch.ones_like(row) << row


def _words(parents: Tensor, row: Tensor, is_node: Tensor, depth: int) -> Tensor:
    """Every row's ancestors and itself as bits, [R, n + 1]; inert rows and the root: themselves.

    The reach of a word doubles in every round, up to `depth` rows above.
    """
    words, upward = _bit(row), torch.where(is_node, parents, row)
    for _ in range(depth.bit_length()):
        words = words | words.gather(1, upward)
        upward = upward.gather(1, upward)
    return words


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
