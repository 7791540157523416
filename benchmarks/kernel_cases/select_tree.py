"""Calls of select_tree: an ordinary tree, and the largest; and the beam's next rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from specformer_kernels.select_tree import reference, triton_kernel

from kernel_cases import BenchCase, compiled

NUM_REQUESTS, NUM_SLOTS = 4, 8


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes of its own."""
    for beam, count, num_nodes in ((4, 8, 16), (4, 8, 63), (8, 16, 63)):
        log_probs = torch.zeros(NUM_REQUESTS, NUM_SLOTS, beam, count, dtype=dtype)
        tokens = torch.zeros(log_probs.shape, dtype=torch.int64)
        call = partial(triton_kernel.select_tree, log_probs, tokens, tokens[..., 0].contiguous())
        yield f"{num_nodes} of {count} for {beam} rows a slot", partial(call, num_nodes)
        paths = torch.zeros(NUM_REQUESTS, beam)
        extend = partial(triton_kernel.extend_beam, log_probs[:, 0], tokens[:, 0], paths, beam)
        if num_nodes == 63:
            yield f"{beam} of {count} for {beam} rows", extend


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Trees of 16 and 63 nodes out of 8 slots, for 1 to 128 requests; log-probabilities float32."""
    batches = [64] if quick else [1, 16, 64, 128]
    sizes = [(4, 8, 16), (8, 16, 63)]
    if device == "cpu":
        batches, sizes = [2], [(2, 2, 4)]
    for requests in batches:
        for beam, count, num_nodes in sizes:
            inputs = requests * NUM_SLOTS * beam * (count * (4 + 8) + 8)
            yield BenchCase(
                name=f"{num_nodes} of {count} for {beam} rows, {requests} requests",
                inputs=partial(_random_inputs, requests, beam, count, num_nodes, device),
                kernel=triton_kernel.select_tree,
                reference=reference.select_tree,
                least_bytes=inputs + requests * (num_nodes + 1) * (8 + 4 + 4 + 8),
                launches=1,
                tolerance=0.0,
                alternatives={"torch.compile": compiled(reference.select_tree)},
            )


def _random_inputs(
    requests: int, beam: int, count: int, num_nodes: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    shape = (requests, NUM_SLOTS, beam, count)
    log_probs = torch.randn(shape, device=device).log_softmax(dim=-1)
    tokens = torch.randint(151_936, shape, device=device)
    order = torch.rand(requests, NUM_SLOTS, beam * count, device=device).argsort(dim=-1)
    return log_probs, tokens, order[..., :beam].contiguous(), num_nodes
