"""Calls of select_tree: an ordinary tree, and the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from specformer_kernels.select_tree import reference, triton_kernel

from kernel_cases import BenchCase, compiled

NUM_REQUESTS, NUM_SLOTS, COMPILED_NODES = 4, 8, 15


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for num_candidates, num_nodes in ((4, 15), (16, 63)):
        log_probs = torch.zeros(NUM_REQUESTS, NUM_SLOTS, num_candidates, dtype=dtype)
        tokens = torch.zeros(log_probs.shape, dtype=torch.int64)
        call = partial(triton_kernel.select_tree, log_probs, tokens, num_nodes)
        yield f"{num_nodes} of {num_candidates} a slot", call


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Trees of 15 and 63 nodes out of 8 slots, for 1 to 128 requests; log-probabilities float32."""
    batches = [64] if quick else [1, 16, 64, 128]
    sizes = [(4, 15), (16, 63)]
    if device == "cpu":
        batches, sizes = [2], [(2, 4)]
    for requests in batches:
        for num_candidates, num_nodes in sizes:
            inputs = requests * NUM_SLOTS * num_candidates * (4 + 8)
            yield BenchCase(
                name=f"{num_nodes} of {num_candidates} a slot, {requests} requests",
                inputs=partial(_random_inputs, requests, num_candidates, num_nodes, device),
                kernel=triton_kernel.select_tree,
                reference=reference.select_tree,
                least_bytes=inputs + requests * (num_nodes + 1) * (8 + 4 + 4 + 8),
                launches=1,
                tolerance=0.0,
                alternatives={
                    "torch.compile": compiled(reference.select_tree)
                    if num_nodes <= COMPILED_NODES
                    else "not tried: one step a node, unrolled, compiles for minutes"
                },
            )


def _random_inputs(
    requests: int, num_candidates: int, num_nodes: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, int]:
    shape = (requests, NUM_SLOTS, num_candidates)
    log_probs = torch.randn(shape, device=device).log_softmax(dim=-1)
    return log_probs, torch.randint(151_936, shape, device=device), num_nodes
