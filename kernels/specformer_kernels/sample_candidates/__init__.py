"""Drafting several candidate tokens per slot, straight from logits."""

from __future__ import annotations

from torch import Tensor

from specformer_kernels.sample_candidates import reference
from specformer_kernels.sample_candidates.reference import Candidates

__all__ = ["Candidates", "sample_candidates"]


def sample_candidates(
    logits: Tensor,
    num_candidates: int,
    *,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    coupled: bool = False,
) -> Candidates:
    """Draw `num_candidates` different tokens per row from q = softmax(logits / temperature).

    A row with a temperature above 0 gives an ordered draw without replacement (Gumbel-top-c). A row
    without one gives its most probable tokens, in order, with q at temperature 1. Equal values go
    to the lower token. With one candidate this is the plain draft sampler. Triton on a GPU, else
    PyTorch.

    Args:
        logits: [N, V] floating point, last dimension contiguous, any row stride. -inf means that
            the token is impossible.
        num_candidates: c, 1 to 16.
        temperature: [N] float32; at most 0 means the most probable tokens. None: 0 for every row.
        seeds: [N] int64, required with `temperature`.
        positions: [N] int64, required with `temperature`. With `coupled`: the position that
            verification decides the slot with, the root's plus the slot. Otherwise numbers that a
            request does not use again in a later step, such as 64 times the root's position plus
            the slot: block verification looks at drafts that it throws away, so drafting them
            anew with the same noise would bias it.
        coupled: draw with `Stream.TARGET`, the noise the target itself is sampled with, for coupled
            verification. Otherwise `Stream.DRAFT`, as every other rule needs.

    Returns:
        Candidates, both fields [N, c]. Where a row has fewer than c possible tokens, the remaining
        places hold token -1 and log-probability -inf. So does a whole row that holds NaN or +inf,
        before or after the division by its temperature.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if logits.is_cuda:
        from specformer_kernels.sample_candidates import triton_kernel

        implementation = triton_kernel.sample_candidates
    else:
        implementation = reference.sample_candidates
    return implementation(
        logits,
        num_candidates,
        temperature=temperature,
        seeds=seeds,
        positions=positions,
        coupled=coupled,
    )
