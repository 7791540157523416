"""Candidates of a beam in plain PyTorch: the oracle of the kernels and the path on CPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from specformer_kernels.noise import Stream, gumbel

MAX_CANDIDATES = 16
MAX_BEAM = 8


class Candidates(NamedTuple):
    """Candidate tokens of every beam row, the best first."""

    tokens: Tensor  # [R, w, c] int64, target ids; -1 where the row has no further token
    log_probs: Tensor  # [R, w, c] float32 (float64 of float64 logits); -inf at -1


def check_arguments(
    logits: Tensor,
    bias: Tensor | None,
    num_candidates: int,
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    ranking: float,
    drawn_ranking: float | None,
    token_ids: Tensor | None,
    chains: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape [R, N], N > 0, found {list(logits.shape)}")
    requests, scored = logits.shape
    if bias is not None and (
        bias.dim() != 3
        or (bias.shape[0], bias.shape[2]) != (requests, scored)
        or not 1 <= bias.shape[1] <= MAX_BEAM
    ):
        raise ValueError(
            f"bias: expected shape [{requests}, w, {scored}], w from 1 to {MAX_BEAM}, found "
            f"{list(bias.shape)}"
        )
    for name, tensor in (("logits", logits), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating point dtype, found {tensor.dtype}")
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, found stride {tensor.stride(-1)}"
            )
    if not 1 <= num_candidates <= MAX_CANDIDATES:
        raise ValueError(f"num_candidates: expected 1 to {MAX_CANDIDATES}, found {num_candidates}")
    for name, tau in (("ranking", ranking), ("drawn_ranking", drawn_ranking)):
        if tau is not None and not 0 < tau < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, found {tau}")
    for name, tensor, length, dtype in (
        ("temperature", temperature, requests, torch.float32),
        ("seeds", seeds, requests, torch.int64),
        ("positions", positions, requests, torch.int64),
        ("token_ids", token_ids, scored, torch.int64),
        ("chains", chains, requests, torch.bool),
    ):
        if tensor is None:
            if temperature is not None and name in ("seeds", "positions"):
                raise ValueError(f"{name}: expected a tensor beside temperature, found None")
            continue
        if tensor.shape != (length,):
            raise ValueError(f"{name}: expected shape [{length}], found {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, found {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, found {tensor.stride()}")


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
    """The c largest scores of every row, in order, and their log-probabilities.

    Shapes and dtypes as in `specformer_kernels.tree_candidates.tree_candidates`. Computes in
    float32, or in float64 for float64 logits. Noise is drawn for the requests that need it.
    """
    check_arguments(
        logits, bias, num_candidates, temperature, seeds, positions, ranking, drawn_ranking,
        token_ids, chains,
    )  # fmt: skip
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype)[:, None]
    scores = scores.clone() if bias is None else scores + bias.to(dtype)  # [R, w, N]
    if temperature is not None and seeds is not None and positions is not None:
        drawn = (temperature > 0).nonzero().flatten()
        if len(drawn):
            ids = torch.arange(logits.shape[1], device=logits.device)
            ids = ids if token_ids is None else token_ids
            noise = gumbel(
                seeds[drawn, None], positions[drawn, None], ids, Stream.TARGET, dtype
            )  # [drawn, N]
            scores[drawn] += (temperature[drawn, None] * noise)[:, None]
    taus = scores.new_full((len(scores), 1, 1), ranking)
    if temperature is not None and drawn_ranking is not None:
        taus.masked_fill_((temperature > 0)[:, None, None], drawn_ranking)
    scores = scores / taus
    is_reported = ~(scores < math.inf).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(is_reported, -math.inf)

    rank = torch.arange(num_candidates, device=logits.device)
    is_left = rank < (scores > -math.inf).sum(dim=-1, keepdim=True)
    if chains is not None:
        is_left &= (rank == 0) | ~chains[:, None, None]
    log_probs = scores.log_softmax(dim=-1)
    best = []
    for _ in range(num_candidates):
        best.append(scores.argmax(dim=-1, keepdim=True))  # the first of equal values
        scores.scatter_(-1, best[-1], -math.inf)
    places = torch.cat(best, dim=-1)  # [R, w, c]
    # What is drawn beyond `is_left` is impossible or was drawn before.
    tokens = places if token_ids is None else token_ids[places]
    return Candidates(
        tokens.masked_fill(~is_left, -1),
        log_probs.gather(-1, places).masked_fill(~is_left, -math.inf),
    )
