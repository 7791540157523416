"""Verification of drafts: which to keep, and the token that follows, from the target's logits."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.verify import reference
from specformer_kernels.verify.reference import Verification

__all__ = ["Verification", "follow", "verify"]


def verify(
    logits: Tensor,
    tokens: Tensor,
    row_start_loc: Tensor,
    max_rows: int,
    *,
    rule: str,
    parents: Tensor | None = None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_rows: Tensor | None = None,
    max_children: int | None = None,
) -> Verification:
    """Decide which drafts of each request to keep, and draw the token that follows them.

    N rows of R requests, request-major. A request's first row is its root, the row of its last
    accepted token; each further row is a node that holds one draft token and the target's logits
    after it. What is emitted is distributed as if the target had been sampled token by token. The
    noise is keyed by seed and position, so a request's result depends on no other request. Triton
    on a GPU, PyTorch elsewhere.

    Args:
        logits: [N, V] floating point, the target's, last dimension contiguous; -inf forbids a
            token.
        tokens: [N] int64 or int32, the draft of each row; a root's is ignored. A token outside
            0 to V - 1, such as -1, is a placeholder: never accepted, and nothing follows from it.
        row_start_loc: [R + 1] int32; request r has rows row_start_loc[r] up to, not including,
            row_start_loc[r + 1]. No rows is legal; rows at or past row_start_loc[R] are inert.
        max_rows: upper bound of the rows of one request, 1 to 65.
        rule: "greedy"; "rejection" (several candidates: drawn without replacement);
            "rejection_with_replacement"; "block" (chains only); "coupled".
        parents: [N] int32, index of each node's parent within its request, whose root is 0; a node
            comes after its parent, and siblings are tried in row order. None: chains.
        temperature: [R] float32; a request at 0 is greedy under every rule. This, `seeds` and
            `positions` are required by every rule but "greedy".
        seeds: [R] int64.
        positions: [N] int64, the position of each row's input token: in a tree the root's plus the
            depth. A request's root moves forward between calls, or noise is used twice.
        draft_logits: [M, V] floating point, the logits of each proposal before temperature; the
            request's temperature applies. None: the drafts were not drawn at random.
        draft_rows: [N] int32 or int64, for each row the row of draft_logits that its children were
            drawn from; ignored at leaves. A row outside 0 to M - 1 proposed nothing: the children
            are placeholders. Several rows may share one.
        max_children: upper bound of the children of one node, required for the two rejection rules
            where both `parents` and `draft_logits` are given.

    Returns:
        tokens: [R, max_rows] int64, the accepted drafts and one more token; -1 beyond.
        num_tokens: [R] int32, 1 to max_rows; 0 for a request without rows, or that met logits which
            cannot be sampled: NaN, +inf, or -inf throughout.
        rows: [R, max_rows] int64, the row whose logits decided each token; -1 beyond. All but the
            first are the accepted nodes, whose K and V are kept.

    Raises:
        ValueError: a shape, dtype or choice breaks the contract; the message names the argument.
    """
    if logits.is_cuda:
        from specformer_kernels.verify import launch

        implementation = launch.verify
    else:
        implementation = reference.verify
    return implementation(
        logits,
        tokens,
        row_start_loc,
        max_rows,
        rule=rule,
        parents=parents,
        temperature=temperature,
        seeds=seeds,
        positions=positions,
        draft_logits=draft_logits,
        draft_rows=draft_rows,
        max_children=max_children,
    )


def follow(
    sampled: Tensor,
    tokens: Tensor,
    row_start_loc: Tensor,
    max_rows: int,
    parents: Tensor | None = None,
) -> Verification:
    """Keep the drafts that equal the token which the target sampled in the row before them.

    The end of the rules "greedy" and "coupled", for a caller that has a sampler of its own. Triton
    on a GPU, PyTorch elsewhere.

    Args:
        sampled: [N] int64, the target's token of each row; negative where none could be sampled.
        tokens: as in `verify`, like the rest.
        row_start_loc: [R + 1] int32.
        max_rows: upper bound of the rows of one request, 1 to 65.
        parents: [N] int32, or None for chains.

    Returns:
        As `verify`; num_tokens is 0 where a negative token was met.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if sampled.is_cuda:
        from specformer_kernels.verify import launch

        implementation = launch.follow
    else:
        implementation = reference.follow
    return implementation(sampled, tokens, row_start_loc, max_rows, parents)
