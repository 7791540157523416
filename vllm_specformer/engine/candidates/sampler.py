"""Verification along trees: the text is what the target samples without speculation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from specformer_kernels.verify import Verification, follow
from torch import Tensor
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from vllm_specformer.engine.candidates.trees import CandidateTrees
from vllm_specformer.engine.coupled import CoupledSampler, SampledRows


class CandidateSampler(CoupledSampler):
    """Every row is sampled as without speculation; the child that equals it is walked to.

    The noise is keyed by a row's position, which is the root's plus the depth. So siblings, of
    which one is visited at most, share it, and a request's text does not depend on its trees.
    """

    # Set with the first batch: vLLM builds the sampler without the speculator.
    trees: CandidateTrees
    walks_trees = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Fused samplers draw from noise of their own, which no candidate has met.
        self.sampler.use_flashinfer = self.sampler.use_xpu_sampler = False

    def _accept(self, rows: SampledRows) -> Verification:
        """Walk down each request's tree; the logits of rows off its path may end in any order."""
        tokens, parents = self.trees.candidates(rows.row_states, rows.row_places)
        # A grammar has refused these, and what comes after them.
        tokens = torch.where(rows.drafts == rows.input_ids, tokens, -1)
        most = self.num_speculative_steps + 1
        verified = follow(rows.sampled, tokens, rows.starts, most, parents)
        nodes = verified.rows - rows.starts[:-1, None]
        self.trees.accept(rows.states, torch.where(verified.rows < 0, -1, nodes))
        if self._returns_logits(rows.states_np):
            path = self.trees.table.paths[rows.states]
            for tensor in {id(tensor): tensor for tensor in rows.logits}.values():
                _put_paths_first(tensor, path, rows.starts[:-1].long())
        return verified

    def _returns_logits(self, idx_mapping_np: np.ndarray) -> bool:
        wanted = self.sampler.sampling_states.max_num_logprobs(idx_mapping_np)
        return bool(wanted != NO_LOGPROBS or self.sampler.return_sampling_mask)


def _put_paths_first(logits: Tensor, paths: Tensor, first: Tensor) -> None:
    """Move each path's rows [R, n + 1] to the front of its request's, where vLLM looks for them.

    Rank by rank, so that no second copy of all logits is made. A path's rank never exceeds its row,
    so no row is written before it has been read.
    """
    for rank in range(1, paths.shape[1]):
        is_on = paths[:, rank] >= 0
        # A path that has ended writes its root to where it is.
        row, source = (torch.where(is_on, place, 0) for place in (rank, paths[:, rank]))
        logits[first + row] = logits[first + source]
