"""Calls of markov_bias: one slot of a draft step, with the vocabulary of an 8B target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from specformer_kernels.markov_bias import reference, triton_kernel

from kernel_cases import BenchCase, compiled, rounding

NUM_SLOTS, VOCABULARY, RANK = 8, 151936, 64


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for rows, rank, is_gated in (
        (16, RANK, True),
        (16, RANK, False),
        (64, RANK, True),
        (64, 256, True),
    ):
        inputs = _random_inputs(rows, 4096, rank, dtype, "cpu")
        call = partial(triton_kernel.markov_bias, *inputs[: None if is_gated else -1])
        yield f"{rows} rows, rank {rank}, {'gates' if is_gated else 'no gates'}", call


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Draft steps of 1 to 128 requests."""
    batches, scored = [1, 16, 64, 128], VOCABULARY
    if device == "cpu":
        batches, scored = [2], 300
    elif quick:
        batches = [64]
    for requests in batches:
        tables = (scored + requests) * RANK  # all of lm_head, few rows of embed
        logits, gates = 2 * requests * scored, requests * RANK
        yield BenchCase(
            name=f"{requests} requests, {scored} tokens",
            inputs=partial(_random_inputs, requests, scored, RANK, dtype, device),
            kernel=triton_kernel.markov_bias,
            reference=reference.markov_bias,
            least_bytes=(tables + logits + gates) * dtype.itemsize + 8 * requests,
            launches=1,
            tolerance=rounding(dtype),
            alternatives={"torch.compile": compiled(reference.markov_bias)},
        )


def _random_inputs(
    requests: int, scored: int, rank: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    logits = normal(requests, NUM_SLOTS, scored)[:, 1]
    previous = torch.randint(0, scored, (requests,), device=device)
    return logits, previous, normal(scored, rank), normal(scored, rank), normal(requests, rank)
