"""Two collectives that vLLM's CPU communicator lacks, so that experts work under data parallelism.

On every platform vLLM hands tokens to the experts of other ranks with `all_gatherv` and gets them
back with `reduce_scatterv`; for a CPU nobody has written these two. Given as
`--worker-extension-cls=support.cpu_collectives.Collectives`, so that each worker imports this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Collectives:
    """Nothing of its own: importing the module is enough."""


def all_gatherv(
    self: Any, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
) -> Tensor | list[Tensor]:
    assert dim == 0
    if isinstance(input_, list):
        return [_gathered(self, tensor, sizes) for tensor in input_]
    return _gathered(self, input_, sizes)


def _gathered(self: Any, tensor: Tensor, sizes: list[int] | None) -> Tensor:
    sizes = sizes or [len(tensor)] * self.world_size
    parts = [tensor.new_empty(size, *tensor.shape[1:]) for size in sizes]
    parts[self.rank_in_group].copy_(tensor)
    for rank, part in zip(self.ranks, parts, strict=True):
        dist.broadcast(part, rank, self.device_group)
    return torch.cat(parts)


def reduce_scatterv(
    self: Any, input_: Tensor, dim: int = -1, sizes: list[int] | None = None
) -> Tensor:
    assert dim == 0
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    return total.split(sizes or len(total) // self.world_size)[self.rank_in_group]


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv
