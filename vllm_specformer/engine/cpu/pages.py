"""The head's pages on a CPU: vLLM's own CPU attention reads them in place.

Its kernels attend to pages and to nothing else. So the slots' K and V are put behind their context,
into the request's own pages. Those places belong to tokens that no step has computed yet, or whose
drafts were rejected: the step that computes them stores them before any row sees them, and a page
is shared through the prefix cache only as far as it holds accepted tokens. vLLM allocates such room
for most steps, not for all (near the maximum length, or for a head that opens more slots than it is
asked for); a request without it gets a copy of its pages for that step, with a page more.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

_SPLITS_CONTEXTS: bool = envs.VLLM_CPU_ATTN_SPLIT_KV


@cache
def _instruction_set(dtype: torch.dtype, page_size: int, head_size: int) -> str | None:
    """Which of vLLM's kernels to use for such pages, by its name there; None where none takes them.

    Each orders the K of a page in its own way.
    """
    sizes = CPUAttentionBackend.get_supported_kernel_block_sizes()
    if (
        not hasattr(torch.ops._C, "cpu_attention_with_kv_cache")
        or dtype not in CPUAttentionBackend.supported_dtypes
        or head_size not in CPUAttentionBackend.get_supported_head_sizes()
        or not any(_is_of_size(page_size, size) for size in sizes)
    ):
        return None
    isa = _get_attn_isa(dtype, page_size, head_size)
    # The same instructions on 16 tokens at a time instead of 32: slots take a tenth less time.
    return "vec16" if isa == "vec" else isa


def _is_of_size(page_size: int, size: int | MultipleOf) -> bool:
    return page_size == size if isinstance(size, int) else page_size % size.base == 0


@lru_cache(maxsize=256)
def _starts(requests: int, rows: int) -> Tensor:
    """First row of each request that has `rows` of them, and the end: int32 [requests + 1]."""
    return torch.arange(0, requests * rows + 1, rows, dtype=torch.int32)


@cache
def _offsets(rows: int) -> Tensor:
    return torch.arange(rows)


class CpuPages:
    """A paged cache as vLLM's CPU kernels write and read it.

    Args:
        key, value: [num_blocks, num_kv_heads, block_size, head_size]; the last two dimensions are
            contiguous.
        isa: the kernels' name for the order inside each head's share of a page.
    """

    def __init__(self, key: Tensor, value: Tensor, isa: str) -> None:
        self.key, self.value, self.isa = key, value, isa
        self.block_size = key.shape[2]

    @classmethod
    def over(cls, key: Tensor, value: Tensor) -> CpuPages | None:
        """The cache as such pages, or None where the kernels do not take it."""
        block_size, head_size = key.shape[2:]
        if key.is_cuda or any(x.stride()[2:] != (head_size, 1) for x in (key, value)):
            return None
        isa = _instruction_set(key.dtype, block_size, head_size)
        return None if isa is None else cls(key, value, isa)

    def store(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write rows [T, kv_heads, D] to their slots, int64 [T]; a negative slot skips the row."""
        # The kernels multiply the V of rows past a request's length by a weight of 0, which does
        # not silence a NaN that the page's last owner left there.
        value = value.nan_to_num()
        ops.cpu_attn_reshape_and_cache(key, value, self.key, self.value, slots, self.isa)

    def attend(
        self, query: Tensor, starts: Tensor, block_table: Tensor, lens: Tensor, scale: float
    ) -> Tensor:
        """Every row [T, heads, D] sees the first tokens of its request, `lens` [R] int32 of them.

        Args:
            starts: int32 [R + 1], each request's first row, and T.
            block_table: int32 [R, blocks]; entries past those tokens are ignored.
            lens: at least 1 each.
        """
        _, heads, size = query.shape
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lens),
            num_heads=heads,
            num_kv_heads=self.key.shape[1],
            head_dim=size,
            seq_lens=lens,
            dtype=query.dtype,
            query_start_loc=starts,
            causal=False,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=_SPLITS_CONTEXTS,
        )
        out = query.new_empty(query.shape)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.key,
            value_cache=self.value,
            output=out,
            query_start_loc=starts,
            seq_lens=lens,
            scale=scale,
            causal=False,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
        return out

    def copies(self, block_table: Tensor, lens: Tensor, room: int) -> tuple[CpuPages, Tensor]:
        """The first `lens` [R] tokens of some requests, and pages for `room` more behind each.

        Returns:
            Pages in memory of their own, and their block table.
        """
        blocks = -(-(int(lens.max()) + room) // self.block_size)
        table = F.pad(block_table, (0, max(0, blocks - block_table.shape[1])))[:, :blocks]
        is_filled = torch.arange(blocks) * self.block_size < lens[:, None]
        # A request's first page stands in for those it has not: its contents are finite.
        source = torch.where(is_filled, table, table[:, :1]).flatten()
        key, value = (side.index_select(0, source) for side in (self.key, self.value))
        pages = CpuPages(key, value, self.isa)
        return pages, torch.arange(len(source), dtype=torch.int32).view(table.shape)


def rotated(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding as `specformer_kernels.kv_store.rotate` does it, in one pass over float32.

    Args:
        x: [T, heads, D]; table: float32 [max_position, D]; positions: int64 [T].
    """
    wide = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    ops.rotary_embedding(positions, wide.flatten(1), None, x.shape[-1], table, is_neox=True)
    return wide.to(x.dtype)


class CpuContext:
    """One draft step's context on a CPU: see `attention.DraftContext`.

    Args:
        block_table: int32 [R, blocks].
        context_lens: integer [R], tokens up to each request's anchor, at least one.
        block_counts: integer [R], entries of the block table that belong to the request. The rest
            may name other requests' pages.
    """

    def __init__(
        self,
        pages: CpuPages,
        block_table: Tensor,
        context_lens: Tensor,
        block_counts: Tensor,
        scale: float,
    ) -> None:
        self.pages, self.table, self.lens = pages, block_table, context_lens.int()
        self.room = block_counts * pages.block_size - self.lens  # [R] tokens
        self.scale = scale

    def anchors(self, query: Tensor) -> Tensor:
        starts = _starts(len(query), 1)
        return self.pages.attend(query, starts, self.table, self.lens, self.scale)

    def slots(self, query: Tensor, key: Tensor, value: Tensor, mixed: bool) -> Tensor:
        if not mixed:
            return self._slots_alone(query, key, value)
        rows = query.shape[1]
        if int(self.room.min()) >= rows:
            return self._slots_behind(self.pages, self.table, self.lens, query, key, value)
        fits = self.room >= rows
        out = query.new_empty(query.shape)
        for chosen, is_copied in ((fits, False), (~fits, True)):
            if not bool(chosen.any()):
                continue
            pages, table, lens = self.pages, self.table[chosen], self.lens[chosen]
            if is_copied:
                pages, table = pages.copies(table, lens, rows)
            parts = query[chosen], key[chosen], value[chosen]
            out[chosen] = self._slots_behind(pages, table, lens, *parts)
        return out

    def _slots_alone(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The paper's mask: slots see each other and no context."""
        query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2)

    def _slots_behind(
        self,
        pages: CpuPages,
        table: Tensor,
        lens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Write the slots behind their context and attend to both."""
        requests, rows = key.shape[:2]
        starts = _starts(requests, rows)
        positions = (lens[:, None] + _offsets(rows)).flatten()  # int64
        places = torch.empty_like(positions)
        torch.ops._C.compute_slot_mapping_kernel_impl(
            starts, positions, table, places, pages.block_size
        )
        pages.store(key.flatten(0, 1), value.flatten(0, 1), places)
        out = pages.attend(query.flatten(0, 1), starts, table, lens + rows, self.scale)
        return out.view(query.shape)
