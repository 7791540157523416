"""Drafting candidate tokens in plain PyTorch: the oracle of the kernels and the path on CPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from specformer_kernels.noise import Stream, gumbel

MAX_CANDIDATES = 16


class Candidates(NamedTuple):
    """Candidate tokens of each row, in the order in which they were drawn."""

    tokens: Tensor  # [N, c] int64; -1 where the row has no further token
    log_probs: Tensor  # [N, c] float32 (float64 of float64 logits): log q(token); -inf at -1


def check_arguments(
    logits: Tensor,
    num_candidates: int,
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape [N, V], V > 0, found {list(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating point dtype, found {logits.dtype}")
    if logits.numel() and logits.stride(-1) != 1:
        raise ValueError(
            f"logits: expected a contiguous last dimension, found stride {logits.stride(-1)}"
        )
    if not 1 <= num_candidates <= MAX_CANDIDATES:
        raise ValueError(f"num_candidates: expected 1 to {MAX_CANDIDATES}, found {num_candidates}")
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    ):
        if tensor is None:
            if temperature is not None:
                raise ValueError(f"{name}: expected a tensor beside temperature, found None")
            continue
        if tensor.shape != logits.shape[:1]:
            raise ValueError(
                f"{name}: expected shape [{logits.shape[0]}], found {list(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, found {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, found {tensor.stride()}")


def sample_candidates(
    logits: Tensor,
    num_candidates: int,
    *,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    coupled: bool = False,
) -> Candidates:
    """The c largest of scaled logits plus Gumbel noise, in order, and their log-probabilities.

    Shapes and dtypes as in `specformer_kernels.sample_candidates.sample_candidates`. Computes in
    float32, or in float64 for float64 logits.
    """
    check_arguments(logits, num_candidates, temperature, seeds, positions)
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature is not None:
        scaled = scaled / torch.where(temperature > 0, temperature, 1.0)[:, None]
    is_reported = ~(scaled < math.inf).all(dim=-1, keepdim=True)
    scaled = scaled.masked_fill(is_reported, -math.inf)

    keys = scaled.clone()
    if temperature is not None and seeds is not None and positions is not None:
        stream = Stream.TARGET if coupled else Stream.DRAFT
        vocabulary = torch.arange(logits.shape[1], device=logits.device)
        noise = gumbel(seeds[:, None], positions[:, None], vocabulary, stream, scaled.dtype)
        keys += noise.masked_fill(temperature[:, None] <= 0, 0.0)
    drawn = []
    for _ in range(num_candidates):
        drawn.append(keys.argmax(dim=-1, keepdim=True))  # the first of equal values
        keys.scatter_(-1, drawn[-1], -math.inf)
    tokens = torch.cat(drawn, dim=-1)  # [N, c]
    # Drawing from what is used up gives a token that is impossible or was drawn before.
    rank = torch.arange(num_candidates, device=logits.device)
    is_left = rank < (scaled > -math.inf).sum(dim=-1, keepdim=True)
    log_probs = scaled.log_softmax(dim=-1).gather(-1, tokens)
    return Candidates(tokens.masked_fill(~is_left, -1), log_probs.masked_fill(~is_left, -math.inf))
