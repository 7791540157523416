"""Block attention on a CPU, for several attentions over one step's context.

A CPU has no kernel that reads pages in place, so the pages are copied side by side first, and the
copy is what costs. A draft step attends to the same context twice (its anchors, then its slots), so
it gathers once, with room behind each context for the block's own rows. Uniform blocks only, and
every row sees its whole block; the general operation is `block_attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class GatheredContext:
    """Copies of the cached K and V of R requests.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides but the last's.
        block_table: [R, max_blocks] int32; entries past a request's own blocks are ignored.
        context_lens: [R] integer, cached tokens of each request; read on the host.
        room: rows that `append` will add.
    """

    def __init__(
        self, kv_cache: Tensor, block_table: Tensor, context_lens: Tensor, room: int
    ) -> None:
        block_size = kv_cache.shape[2]
        num_blocks = -(-(int(context_lens.max()) + room) // block_size)
        missing = num_blocks - block_table.shape[1]
        if missing > 0:  # the room may reach past the longest request a table can hold
            block_table = F.pad(block_table, (0, missing))
        table = block_table[:, :num_blocks].clamp(0, kv_cache.shape[0] - 1)
        pages = kv_cache.transpose(0, 1)[:, table]  # [kv_heads, R, blocks, block_size, 2 * D]
        self.tokens = pages.flatten(2, 3)  # [kv_heads, R, L, 2 * D]
        self.lens = context_lens
        self._columns = torch.arange(self.tokens.shape[2], device=kv_cache.device)
        self._visible = self._columns < context_lens[:, None]  # [R, L]
        # A weight of 0 does not silence a NaN left in a page by another request.
        self.tokens.masked_fill_(~self._visible[:, :, None], 0.0)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Put the block's own rows [R, n, kv_heads, D] behind each context; n <= room."""
        requests, rows = key.shape[:2]
        offsets = torch.arange(rows, device=key.device)
        position = self.lens[:, None] + offsets  # [R, n]
        request = torch.arange(requests, device=key.device)[:, None]
        self.tokens[:, request, position] = torch.cat((key, value), dim=-1).permute(2, 0, 1, 3)
        self._visible = self._columns < (self.lens + rows)[:, None]

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Every row [R, n, heads, D] sees its request's context and what was appended."""
        requests, rows, heads, head_size = query.shape
        kv_heads = self.tokens.shape[0]
        # Query heads that share a K/V head become rows of one matrix: [kv_heads, R, group * n, D].
        grouped = query.unflatten(2, (kv_heads, -1)).permute(2, 0, 3, 1, 4).flatten(2, 3)
        key, value = self.tokens.chunk(2, dim=-1)
        # A mask of all four dimensions, or PyTorch leaves its fused path.
        mask = self._visible[None, :, None, :]
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        out = out.unflatten(2, (-1, rows)).permute(1, 3, 0, 2, 4)
        return out.reshape(requests, rows, heads, head_size)
