"""Calls of draft_inputs: an engine of 256 requests and 8,192 tokens a step, 8 slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from specformer_kernels.draft_inputs import DraftBuffers, StepInputs, reference, triton_kernel

from kernel_cases import BenchCase

NUM_SLOTS, MAX_REQUESTS, MAX_TOKENS = 8, 256, 8192
# Read and written: a context row, a request's sampling entries per slot, a request.
TOKEN_BYTES, SAMPLE_BYTES, REQUEST_BYTES = 4 * 8, 8 + 8, 100


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call; nothing depends on the target's dtype."""
    step, *others = _random_inputs(4, MAX_REQUESTS, MAX_TOKENS, "cpu")
    yield "8 slots", partial(triton_kernel.draft_inputs, step, *others)
    step = step._replace(last_rows=torch.arange(4))
    yield "8 slots, after trees", partial(triton_kernel.draft_inputs, step, *others)


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Verification steps of 1 to 256 requests."""
    batches, max_requests, max_tokens = [1, 16, 64, 256], MAX_REQUESTS, MAX_TOKENS
    if device == "cpu":
        batches, max_requests, max_tokens = [2], 3, 40
    elif quick:
        batches = [64]
    for requests in batches:
        rows = requests * (NUM_SLOTS + 1)
        yield BenchCase(
            name=f"{requests} requests, {rows} rows",
            inputs=partial(_random_inputs, requests, max_requests, max_tokens, device),
            kernel=partial(_filled, triton_kernel.draft_inputs),
            reference=partial(_filled, reference.draft_inputs),
            least_bytes=rows * TOKEN_BYTES
            + max_requests * (REQUEST_BYTES + NUM_SLOTS * SAMPLE_BYTES)
            + 8 * (max_tokens - rows),
            launches=1,
            tolerance=0.0,
        )


def _random_inputs(
    requests: int, max_requests: int, max_tokens: int, device: str
) -> tuple[StepInputs, DraftBuffers, int, int]:
    length, samples = NUM_SLOTS + 1, max_requests * NUM_SLOTS
    rows = requests * length

    def drawn(high: int, size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(high, (size,), device=device).to(dtype)

    step = StepInputs(
        query_start_loc=torch.arange(0, rows + 1, length, device=device).int(),
        positions=drawn(4096, rows),
        slot_mapping=drawn(10**6, rows),
        idx_mapping=torch.randperm(max_requests, device=device)[:requests].int(),
        num_sampled=drawn(length, requests, torch.int32),
        num_rejected=drawn(length, requests, torch.int32),
        last_sampled=drawn(10**5, max_requests),
        next_prefill_tokens=drawn(10**5, max_requests, torch.int32),
        temperature=torch.rand(max_requests, device=device),
        seeds=drawn(2**62, max_requests),
    )
    sizes = 2 * [max_tokens] + 4 * [max_requests] + 2 * [samples] + 3 * [max_requests]
    empty = (torch.zeros(size, dtype=torch.int64, device=device) for size in sizes)
    buffers = DraftBuffers(*empty)._replace(temperature=torch.zeros(max_requests, device=device))
    return step, buffers, requests, rows


def _filled(
    fill: Callable[..., None], step: StepInputs, buffers: DraftBuffers, requests: int, rows: int
) -> torch.Tensor:
    fill(step, buffers, requests, rows)
    return torch.cat([buffer.float() for buffer in buffers])
