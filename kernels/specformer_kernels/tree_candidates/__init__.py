"""Candidate tokens of one slot for every row of a beam, straight from logits."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.tree_candidates import reference
from specformer_kernels.tree_candidates.reference import Candidates

__all__ = ["Candidates", "tree_candidates"]


def tree_candidates(
    logits: Tensor,
    bias: Tensor | None,
    num_candidates: int,
    *,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    ranking: float = 1.0,
    drawn_ranking: float | None = None,
    token_ids: Tensor | None = None,
    chains: Tensor | None = None,
) -> Candidates:
    """The best children of every beam row at one slot, and how they rank.

    A row's score of a token is `logits + bias + temperature * G`, with G the noise that the target
    will sample the slot with, the same for all rows of the request; nothing of it where the
    temperature is at most 0. These are the target's perturbed scores, times its temperature: with
    the target's own logits the best candidate is the target's own sample. Candidates are the c
    largest scores, in order, equal ones by the lower place. For coupled verification, and for
    greedy, which is coupled without noise. Triton on a GPU, else PyTorch.

    Args:
        logits: [R, N] floating point, last dimension contiguous, any row stride. -inf means that
            the token is impossible.
        bias: [R, w, N] floating point, last dimension contiguous: what a row adds to the request's
            logits, w at most 8. None: nothing, all rows of a request are alike and w is 1.
        num_candidates: c, 1 to 16.
        temperature: [R] float32; at most 0 means no noise. None: 0 for every request.
        seeds: [R] int64, required with `temperature`.
        positions: [R] int64, required with `temperature`: the position that verification decides
            the slot with, the root's plus the slot.
        ranking: tau, what scores are divided by at last, above 0. It leaves the order alone; it
            says how much the log-probabilities differ, by which nodes of several slots compete.
        drawn_ranking: the same for requests with a temperature above 0. None: `ranking`.
        token_ids: [N] int64, target ids of the places in N, which noise is keyed by and which are
            returned. None: places are target ids.
        chains: [R] bool, requests whose rows get their best candidate only. None: no request.

    Returns:
        Candidates, both fields [R, w, c]; log-probabilities under the softmax of all N scores,
        noise and ranking included. Where a row has fewer than c candidates, the remaining places
        hold token -1 and log-probability -inf. So does a whole row that holds NaN or +inf.

    Raises:
        ValueError: a shape, dtype or number breaks the contract; the message names the argument.
    """
    if logits.is_cuda:
        from specformer_kernels.tree_candidates import triton_kernel

        implementation = triton_kernel.tree_candidates
    else:
        implementation = reference.tree_candidates
    return implementation(
        logits,
        bias,
        num_candidates,
        temperature=temperature,
        seeds=seeds,
        positions=positions,
        ranking=ranking,
        drawn_ranking=drawn_ranking,
        token_ids=token_ids,
        chains=chains,
    )
