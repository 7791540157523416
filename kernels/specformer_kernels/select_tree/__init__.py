"""Trees of drafted tokens: the best paths through a beam's candidates, and fixed shapes."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.select_tree import reference
from specformer_kernels.select_tree.reference import Beam, FixedTree, Tree, fixed_tree

__all__ = ["Beam", "FixedTree", "Tree", "extend_beam", "fixed_tree", "select_tree"]


def extend_beam(log_probs: Tensor, tokens: Tensor, paths: Tensor | None, width: int) -> Beam:
    """The best children of a slot's rows by the sum along their path: the next slot's rows.

    Children are numbered row by row, candidate by candidate; of equal ones the lower number comes
    first. Triton on a GPU, else PyTorch.

    Args:
        log_probs: [R, w, c] floating point, last dimension contiguous, log-probability (or any
            other weight; what is above 0 counts as 0) of every row's candidates. A row may be
            expanded over the others.
        tokens: [R, w, c] int64, likewise. A candidate whose token is negative, or whose
            log-probability is not finite, is never taken.
        paths: [R, w] float, contiguous: the rows' own sums, -inf of dead ones, in log_probs'
            dtype or float32. None: the first slot, where row 0 alone lives, at 0.
        width: w of the next slot, 1 to 8.

    Returns:
        Beam, every field [R, width], the best first; where children run out, dead rows.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if log_probs.is_cuda:
        from specformer_kernels.select_tree import triton_kernel

        return triton_kernel.extend_beam(log_probs, tokens, paths, width)
    return reference.extend_beam(log_probs, tokens, paths, width)


def select_tree(log_probs: Tensor, tokens: Tensor, origins: Tensor, num_nodes: int) -> Tree:
    """Keep the `num_nodes` best nodes of a beam over the slots, the main chain first.

    Slot d holds the candidate lists of up to w rows, each the children of one candidate of slot
    d - 1. A node is a candidate of a row; its weight is the sum of the log-probabilities along its
    path. The nodes of largest weight always form a tree; equal ones are taken by slot, row and
    candidate. Of its children a node's best is the one that is taken first. The main chain is the
    root's best child, that one's best child and so on, as far as they are in the tree: it stands
    first, in order of depth, then all others by falling weight. So whatever the tree is cut to is
    a tree, and a chain while it is no longer than the main chain. Triton on a GPU, else PyTorch.

    For greedy and coupled verification, and for drafts without a distribution: these are exact
    whatever was drafted. Recursive rejection needs a shape that does not depend on what was drawn,
    see `fixed_tree`.

    Args:
        log_probs: [R, K, w, c] floating point, contiguous, log-probability (or any other weight;
            what is above 0 counts as 0) of each row's candidates, in any order. Of slot 0 row 0
            alone is read: the root's children.
        tokens: [R, K, w, c] int64, contiguous. A candidate whose token is negative, or whose
            log-probability is not finite, is never taken.
        origins: [R, K, w] int64, contiguous: the candidate of the slot before that a row descends
            from, its row times c plus its place (see `extend_beam`), no two rows of a slot from
            the same one. A row of another number, such as -1, is dead. Of slot 0 not read.
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

        return triton_kernel.select_tree(log_probs, tokens, origins, num_nodes)
    return reference.select_tree(log_probs, tokens, origins, num_nodes)
