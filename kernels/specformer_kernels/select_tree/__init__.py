"""Trees of drafted tokens: the most probable paths through the candidates, and fixed shapes."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.select_tree import reference
from specformer_kernels.select_tree.reference import FixedTree, Tree, fixed_tree

__all__ = ["FixedTree", "Tree", "fixed_tree", "select_tree"]


def select_tree(log_probs: Tensor, tokens: Tensor, num_nodes: int) -> Tree:
    """Keep the `num_nodes` most probable nodes of the product of per-slot candidate lists.

    A node at depth d stands for a path that takes one candidate from each of slots 0 to d - 1; its
    probability is the product of theirs. The nodes of largest probability always form a tree. Nodes
    come in the order in which they were chosen: by falling probability; among equal ones the lower
    parent first; under one parent by falling probability, equal ones in candidate order. Triton on
    a GPU, else PyTorch.

    For greedy and coupled verification, and for drafts without a distribution: these are exact
    whatever was drafted. Recursive rejection needs a shape that does not depend on what was drawn,
    see `fixed_tree`.

    Args:
        log_probs: [R, K, c] floating point, contiguous, log-probability (or any other weight of at
            most 0) of each slot's candidates, in any order.
        tokens: [R, K, c] int64, contiguous. A candidate whose token is negative, or whose
            log-probability is not finite, is never taken.
        num_nodes: n, drafted nodes per request, 1 to 63; the root comes on top.

    Returns:
        Tree, every field [R, n + 1], root first, parents before children. Where fewer than n nodes
        are possible, the remaining rows are inert: token -1, parent 0, depth 1, and they see
        nothing but themselves.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if log_probs.is_cuda:
        from specformer_kernels.select_tree import triton_kernel

        return triton_kernel.select_tree(log_probs, tokens, num_nodes)
    return reference.select_tree(log_probs, tokens, num_nodes)
