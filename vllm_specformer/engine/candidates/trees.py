"""The drafted trees of all requests: kept by state row, laid over a batch, walked down."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from specformer_kernels.place_trees import MAX_BLOCK_ROWS, TreeTable, place_trees
from specformer_kernels.select_tree import Tree
from torch import Tensor


class Block(NamedTuple):
    """Rows of a batch that attend by mask."""

    requests: int
    rows: int
    width: int  # most rows of one request


class CandidateTrees:
    """Device tables that a step reads and writes in place, at addresses that never change.

    A tree is drafted in one step and verified in the next one of its request. It counts only if its
    root stands at the position it was drafted for, and it goes when its state row gets a new
    tenant, so that placeholders of the scheduler never meet somebody else's tree.

    Args:
        num_nodes: most nodes of a tree, n.
    """

    def __init__(
        self, max_num_reqs: int, max_num_tokens: int, num_nodes: int, device: torch.device
    ) -> None:
        states, nodes = max_num_reqs + 1, num_nodes + 1

        def filled(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.table = TreeTable(
            roots=filled(-1, states),
            tokens=filled(-1, states, nodes),
            parents=filled(0, states, nodes, dtype=torch.int32),
            depths=filled(1, states, nodes, dtype=torch.int32),
            mask=filled(0, states, nodes),
            is_live=filled(0, states, dtype=torch.bool),
            paths=filled(-1, states, nodes, dtype=torch.int32),
        )
        # Requests whose next token depends on more than the tokens above it: no tree for them.
        self.needs_chain = filled(0, states, dtype=torch.bool)
        # What the target's attention reads: see `place_trees`.
        self.row_mask = filled(0, max_num_tokens)
        self.context_lens = filled(0, max_num_reqs, dtype=torch.int32)
        self._block = (0, 0)
        # Most rows of a request in a block: no more than two, since each is a kernel of its own.
        self.widths = (nodes, MAX_BLOCK_ROWS)

    def admit(self, state: int, needs_chain: bool) -> None:
        """Give a state row to a new request, which has drafted nothing yet."""
        self.table.roots[state].fill_(-1)
        self.needs_chain[state].fill_(needs_chain)

    def place(self, batch: Any) -> None:
        """Lay the trees over the rows of a batch that is about to be run; its positions change."""
        place_trees(
            self.table,
            batch.query_start_loc,
            batch.cu_num_logits,
            batch.idx_mapping,
            batch.seq_lens,
            batch.positions,
            self.row_mask,
            self.context_lens,
        )
        lengths = np.diff(batch.query_start_loc_np[: batch.num_reqs + 1])
        long = np.flatnonzero(lengths > MAX_BLOCK_ROWS)
        requests = int(long[0]) if len(long) else batch.num_reqs
        self._block = (requests, int(batch.query_start_loc_np[requests]))

    def forget_batch(self) -> None:
        """The batch has been run: a dummy step that comes next has no trees."""
        self._block = (0, 0)

    def block(self, metadata: Any) -> Block:
        """The first requests of a batch, which attend by mask; all trees are among them.

        vLLM puts requests with drafts first in a batch. A prompt's long chunk ends the block: where
        there is one, `place` has just seen the same batch. No graph is captured of such a batch.
        """
        requests, rows = self._block
        if metadata.max_query_len <= MAX_BLOCK_ROWS:  # so it is while graphs are captured
            requests, rows = len(metadata.query_start_loc) - 1, metadata.num_actual_tokens
        assert requests < len(metadata.query_start_loc), "another batch's block"
        is_narrow = metadata.max_query_len <= self.widths[0]
        return Block(requests, rows, self.widths[0 if is_narrow else -1])

    def candidates(self, states: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and parents of the nodes [N] of state rows [N]; token -1 where no tree is."""
        tokens = torch.where(self.table.is_live[states], self.table.tokens[states, nodes], -1)
        return tokens, self.table.parents[states, nodes]

    def accept(self, states: Tensor, nodes: Tensor) -> None:
        """Keep the accepted nodes [R, n + 1], which change, of state rows [R]; -1 beyond a path."""
        nodes[:, 0].fill_(0)  # also where nothing was sampled, from logits that hold NaN
        self.table.paths[states] = nodes.int()

    def keep(self, states: Tensor, roots: Tensor, tree: Tree) -> None:
        """Keep drafted trees [R] whose roots will stand at `roots` [R]; state -1 is nobody's."""
        nodes = tree.tokens.shape[1]
        for name in ("tokens", "parents", "depths", "mask"):
            getattr(self.table, name)[:, :nodes][states] = getattr(tree, name)
        self.table.roots[states] = roots
