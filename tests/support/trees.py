"""Random trees by state row, and batches of requests that verify them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from specformer_kernels.place_trees import TreeTable
from torch import Tensor

STATES = 9


class Batch(NamedTuple):
    """Requests of some rows and drafts; T rows, rubbish behind what belongs to the batch."""

    query_start_loc: Tensor  # int32
    row_start_loc: Tensor  # int32
    idx_mapping: Tensor  # int64
    seq_lens: Tensor  # int32
    positions: Tensor  # int64 [T], one after the other in each request
    slot_mapping: Tensor  # int64 [T]


def random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    """Parents of the root (itself) and of nodes behind it, each one before its node."""
    draws = [int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, nodes + 1)]
    return [0, *draws]


def make_table(nodes: int, seed: int = 0) -> TreeTable:
    """Random trees, none of which has been placed yet."""
    generator = torch.Generator().manual_seed(seed)
    size = (STATES + 1, nodes + 1)
    parents = torch.tensor([random_parents(nodes, generator) for _ in range(STATES + 1)])
    depths, mask = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.int64)
    for node in range(1, nodes + 1):
        above = parents[:, node, None]
        depths[:, node] = depths.gather(1, above).squeeze(1) + 1
        own = 1 << node if node < 63 else -(1 << 63)  # the last bit is the sign
        mask[:, node] = mask.gather(1, above).squeeze(1) | own
    tokens = torch.randint(0, 500, size, generator=generator)
    tokens[:, 0] = -1
    return TreeTable(
        roots=torch.full((STATES + 1,), -1),
        tokens=tokens,
        parents=parents.int(),
        depths=depths.int(),
        mask=mask,
        is_live=torch.zeros(STATES + 1, dtype=torch.bool),
        paths=torch.full(size, -5, dtype=torch.int32),
    )


def make_batch(shape: list[tuple[int, int]], seed: int = 0) -> Batch:
    """Requests of so many rows and drafts in this order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length for length, _ in shape]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    sampled = torch.tensor([0, *(drafts + 1 for _, drafts in shape)]).cumsum(0)
    computed = torch.randint(0, 1000, (len(shape),), generator=generator).tolist()
    positions = [at + i for at, n in zip(computed, lengths, strict=True) for i in range(n)]
    tail = torch.full((3,), -77)
    return Batch(
        query_start_loc=torch.cat([starts, tail]).int(),
        row_start_loc=sampled.int(),
        idx_mapping=torch.randperm(STATES, generator=generator)[: len(shape)],
        seq_lens=torch.tensor([a + n for a, n in zip(computed, lengths, strict=True)]).int(),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.randperm(5000, generator=generator)[: len(positions)],
    )
