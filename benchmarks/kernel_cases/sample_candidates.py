"""Calls of sample_candidates: the plain draft sampler, and the most candidates at 256k tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from specformer_kernels.sample_candidates import reference, triton_kernel

from kernel_cases import Alternative, BenchCase, compiled

NUM_ROWS, NUM_SLOTS = 16, 8
# Rounding of the noise swaps two draws that are this close; a swap counts for both.
DRAW_TOLERANCE = 1e-2


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    words = torch.zeros(NUM_ROWS, dtype=torch.int64)
    noise = {"temperature": torch.ones(NUM_ROWS), "seeds": words, "positions": words}
    for vocabulary, num_candidates in ((151_936, 1), (151_936, 4), (262_144, 16)):
        logits = torch.zeros(NUM_ROWS, vocabulary, dtype=dtype)
        call = partial(triton_kernel.sample_candidates, logits, num_candidates)
        yield f"{num_candidates} of {vocabulary}", partial(call, **noise)
    yield f"{num_candidates} most probable of {vocabulary}", call


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """The 8 slots of 1 to 128 requests: plain drafts, 4 candidates drawn, the 4 most probable."""
    vocabulary, batches = 151_936, [1, 16, 64, 128]
    if device == "cpu":
        vocabulary, batches = 300, [1]
    elif quick:
        batches = [64]
    for requests in batches:
        rows = requests * NUM_SLOTS
        for num_candidates, is_drawn in ((1, True), (4, True), (4, False)):
            noise = 20 * rows if is_drawn else 0
            yield BenchCase(
                name=f"{num_candidates} {'drawn' if is_drawn else 'most probable'}, {rows} rows",
                inputs=partial(_random_inputs, rows, vocabulary, is_drawn, dtype, device),
                kernel=partial(_sample, triton_kernel.sample_candidates, num_candidates),
                reference=partial(_sample, reference.sample_candidates, num_candidates),
                least_bytes=rows * (vocabulary * dtype.itemsize + num_candidates * 12) + noise,
                launches=2,
                tolerance=DRAW_TOLERANCE,
                alternatives={
                    "torch.compile": compiled(
                        partial(_sample, reference.sample_candidates, num_candidates)
                    ),
                    # Other noise, and another order among equal logits.
                    "softmax, multinomial" if is_drawn else "log_softmax, topk": Alternative(
                        partial(_multinomial if is_drawn else _topk, num_candidates),
                        is_comparable=False,
                    ),
                },
            )


def _random_inputs(
    rows: int, vocabulary: int, is_drawn: bool, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(rows, vocabulary, dtype=dtype, device=device)
    if not is_drawn:
        return (logits,)
    seeds, positions = torch.randint(2**40, (2, rows), device=device)
    return logits, torch.ones(rows, device=device), seeds, positions


def _sample(
    sample: Callable[..., reference.Candidates],
    num_candidates: int,
    logits: torch.Tensor,
    temperature: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> reference.Candidates:
    return sample(logits, num_candidates, temperature=temperature, seeds=seeds, positions=positions)


def _multinomial(
    num_candidates: int, logits: torch.Tensor, temperature: torch.Tensor, *_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = (logits.float() / temperature[:, None]).softmax(dim=-1)
    tokens = torch.multinomial(probabilities, num_candidates)
    return tokens, probabilities.gather(-1, tokens).log()


def _topk(num_candidates: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs, tokens = logits.float().log_softmax(dim=-1).topk(num_candidates)
    return tokens, log_probs
