"""Calls of tree_candidates: the root's children, a beam's, and the most at 256k tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from specformer_kernels.tree_candidates import reference, triton_kernel

from kernel_cases import Alternative, BenchCase
from kernel_cases.sample_candidates import DRAW_TOLERANCE, NUM_ROWS

BEAM, LIST = 4, 8


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for scored, beam, count in ((151_936, 1, LIST), (151_936, BEAM, LIST), (262_144, 8, 16)):
        words = torch.zeros(NUM_ROWS, dtype=torch.int64)
        yield (
            f"{count} of {scored}, {beam} rows",
            partial(
                triton_kernel.tree_candidates,
                torch.zeros(NUM_ROWS, scored, dtype=dtype),
                torch.zeros(1, dtype=dtype).expand(NUM_ROWS, beam, scored).contiguous(),
                count,
                temperature=torch.ones(NUM_ROWS),
                seeds=words,
                positions=words,
                token_ids=torch.zeros(scored, dtype=torch.int64),
                chains=torch.zeros(NUM_ROWS, dtype=torch.bool),
            ),
        )


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """One slot of 1 to 128 requests: the 8 best children of 4 rows, with and without noise."""
    scored, batches = 151_936, [1, 16, 64, 128]
    if device == "cpu":
        scored, batches = 300, [2]
    elif quick:
        batches = [64]
    for requests in batches:
        for is_drawn in (True, False):
            read = requests * ((1 + BEAM) * scored * dtype.itemsize + 20 * is_drawn)
            yield BenchCase(
                name=f"{LIST} {'drawn' if is_drawn else 'best'}, {requests} requests of {BEAM}",
                inputs=partial(_random_inputs, requests, scored, is_drawn, dtype, device),
                kernel=partial(_candidates, triton_kernel.tree_candidates),
                reference=partial(_candidates, reference.tree_candidates),
                least_bytes=read + requests * BEAM * LIST * 12,
                launches=2,
                tolerance=DRAW_TOLERANCE,
                alternatives={
                    "torch.compile": "not tried: the reference looks which rows want noise",
                    # Another order among equal scores; and no noise.
                    "log_softmax, topk": Alternative(_topk, is_comparable=False),
                },
            )


def _random_inputs(
    requests: int, scored: int, is_drawn: bool, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(requests, scored, dtype=dtype, device=device)
    bias = torch.randn(requests, BEAM, scored, dtype=dtype, device=device)
    if not is_drawn:
        return logits, bias
    seeds, positions = torch.randint(2**40, (2, requests), device=device)
    return logits, bias, torch.ones(requests, device=device), seeds, positions


def _candidates(
    find: Callable[..., reference.Candidates],
    logits: torch.Tensor,
    bias: torch.Tensor,
    temperature: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> reference.Candidates:
    noise = {"temperature": temperature, "seeds": seeds, "positions": positions}
    return find(logits, bias, LIST, **noise)


def _topk(
    logits: torch.Tensor, bias: torch.Tensor, *_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs, tokens = (logits[:, None] + bias).float().log_softmax(dim=-1).topk(LIST)
    return tokens, log_probs
