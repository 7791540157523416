"""The target's attention over rows that are trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from specformer_kernels.block_attention import block_attention
from torch import Tensor

if TYPE_CHECKING:
    from vllm_specformer.engine.candidates.trees import CandidateTrees

# Parts of attention that `block_attention` does not have, by the attribute that tells of them.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None, -1, (-1, -1)),
    "alibi_slopes": (None,),
    "logits_soft_cap": (None, 0),
    "sinks": (None,),
    "kv_sharing_target_layer_name": (None,),
    "attn_type": ("decoder",),
}


class TreeAttention:
    """Mix-in of a backend's implementation, whose cache holds V beside K.

    Requests of up to 64 new rows, all trees among them, attend by `block_attention`: to their
    context in the pages, and to their own rows by mask. A batch with longer requests goes through
    the backend, too, and the block's rows are written over what it gave for them.
    """

    # Set once the speculator has been built; without it this is the backend's own attention.
    trees: CandidateTrees | None = None

    def missing(self) -> str | None:
        """The first property of this layer that attention over trees cannot have, or None."""
        for name, harmless in _WITHOUT.items():
            value = getattr(self, name, None)
            if not any(value is one or value == one for one in harmless):
                return f"{name}={value}"
        return None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As vLLM's; key and value have been written to the cache already."""
        inputs = (layer, query, key, value, kv_cache, attn_metadata, output, *args)
        if self.trees is None or attn_metadata is None:
            return super().forward(*inputs, **kwargs)  # type: ignore[misc]
        requests, rows, width = self.trees.block(attn_metadata)
        if rows < attn_metadata.num_actual_tokens:
            super().forward(*inputs, **kwargs)  # type: ignore[misc]
        if requests:
            attended = block_attention(
                query[:rows],
                key[:rows],
                value[:rows],
                kv_cache,
                attn_metadata.block_table[:requests],
                self.trees.context_lens[:requests],
                attn_metadata.query_start_loc[: requests + 1],
                self.trees.row_mask[:rows],
                self.scale,  # type: ignore[attr-defined]
                width,
            )
            output[:rows] = attended.view_as(output[:rows])
        return output

    def warm_up(
        self, kv_cache: Tensor, block_table: Tensor, starts: Tensor, dtype: torch.dtype
    ) -> None:
        """Compile what `forward` may launch: one row of one request, for each width.

        Args:
            block_table: the runner's own, int32 [most requests, blocks].
            starts: int32 [2], 0 and 1.
            dtype: of queries.
        """
        assert self.trees is not None
        device = kv_cache.device
        heads, kv_heads = self.num_heads, self.num_kv_heads  # type: ignore[attr-defined]
        rows = torch.zeros(
            (1, heads, self.head_size),  # type: ignore[attr-defined]
            dtype=dtype,
            device=device,
        )
        for width in self.trees.widths:
            block_attention(
                rows,
                rows[:, :kv_heads],
                rows[:, :kv_heads],
                kv_cache,
                block_table[:1],
                self.trees.context_lens[:1],
                starts,
                self.trees.row_mask[:1],
                self.scale,  # type: ignore[attr-defined]
                width,
            )
