"""Block attention on a CPU, for several attentions over one step's context.

A CPU has no kernel that reads pages in place, so keys and values are copied side by side first. A
draft step attends to the same context twice (its anchors, then its slots), so it gathers once, with
room behind each context for the block's own rows. Uniform blocks only, and every row sees its whole
block; the general operation is `block_attention`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from specformer_kernels.block_attention.reference import gather_context

# Memory of the last context, for the next one. The system hands out large allocations as pages yet
# to be cleared, and clearing them takes several times as long as copying the context into them.
_spare: list[Tensor] = []
# Requests times K/V heads from which on separate products beat fused attention in bfloat16.
_MANY = 6


class GatheredContext:
    """Copies of the cached K and V of R requests.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides but the last's.
        block_table: [R, max_blocks] int32; entries past a request's own blocks are ignored.
        context_lens: [R] integer, cached tokens of each request; read on the host.
        room: rows that `append` will add.
    """

    _memory = torch.empty(0, dtype=torch.uint8)  # for `__del__` after a failed `__init__`

    def __init__(
        self, kv_cache: Tensor, block_table: Tensor, context_lens: Tensor, room: int
    ) -> None:
        kv_heads, size = kv_cache.shape[1], kv_cache.shape[3]
        length = int(context_lens.max()) + room
        self.lens = context_lens
        self._columns = torch.arange(length)
        self._visible = self._columns < context_lens[:, None]  # [R, L]
        num_bytes = self._visible.numel() * kv_heads * size * kv_cache.itemsize
        self._memory = _take(num_bytes)
        out = self._memory[:num_bytes].view(kv_cache.dtype)
        context = gather_context(kv_cache, block_table, self._visible, out)
        self.key, self.value = context.unbind()  # [kv_heads, R, L, D]

    def __del__(self) -> None:
        if not _spare or _spare[0].numel() < self._memory.numel():
            _spare[:] = [self._memory]

    def append(self, key: Tensor, value: Tensor) -> None:
        """Put the block's own rows [R, n, kv_heads, D] behind each context; n <= room.

        Called again with as many rows it replaces them.
        """
        requests, rows = key.shape[:2]
        request = torch.arange(requests)[:, None]
        position = self.lens[:, None] + torch.arange(rows)  # [R, n]
        self.key[:, request, position] = key.permute(2, 0, 1, 3)
        self.value[:, request, position] = value.permute(2, 0, 1, 3)
        self._visible = self._columns < (self.lens + rows)[:, None]

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Every row [R, n, heads, D] sees its request's context and what was appended.

        At least one token, that is.
        """
        rows = query.shape[1]
        kv_heads = self.key.shape[0]
        # Query heads that share a K/V head become rows of one matrix: [kv_heads, R, group * n, D].
        grouped = query.unflatten(2, (kv_heads, -1)).permute(2, 0, 3, 1, 4).flatten(2, 3)
        is_slow = query.dtype == torch.bfloat16 and kv_heads * len(query) >= _MANY
        attend = _attend_in_steps if is_slow else _attend
        out = attend(grouped, self.key, self.value, self._visible, scale)
        return out.unflatten(2, (-1, rows)).permute(1, 3, 0, 2, 4).flatten(2, 3)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    # A mask of all four dimensions, or PyTorch leaves its fused path.
    mask = visible[None, :, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _attend_in_steps(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Up to twice as fast as the fused attention, whose bfloat16 is slow with few rows to a key.

    The price: scores are rounded to bfloat16 before the softmax, as PyTorch's matmul returns them.
    """
    hidden = torch.where(visible, 0.0, -math.inf).to(query.dtype)
    bias = hidden.expand(len(key), 1, -1, -1).reshape(-1, 1, hidden.shape[1])
    scores = torch.baddbmm(
        bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale
    )
    return torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).view(query.shape)


def _take(num_bytes: int) -> Tensor:
    """At least so many bytes, of the spare memory if that is enough."""
    memory = _spare.pop() if _spare else None
    if memory is not None and memory.numel() >= num_bytes:
        return memory
    # A power of two lets contexts grow before memory is asked for again; what is not used is never
    # backed. No inference tensor: those cannot be written to outside of inference mode.
    with torch.inference_mode(False):
        return torch.empty(1 << (num_bytes - 1).bit_length(), dtype=torch.uint8)
