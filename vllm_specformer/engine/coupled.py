"""Coupled verification on the V2 runner: the text does not depend on what was drafted.

vLLM's own rule accepts a draft by comparing probabilities, so at temperature > 0 a request's text
changes with the draft although its distribution does not. Here every verified row is sampled just
as it would be without speculation (V2's sampler draws from noise keyed by request seed and
position), and a draft is accepted while it equals the sampled token. With a seed the text is then
the same with speculation on and off, with any head and any number of drafts. A greedy draft is
accepted as often as under vLLM's rule; see docs/verification.md for sampled ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from specformer_kernels.verify import Verification, follow
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class SampledRows(NamedTuple):
    """N rows of R requests, each with the token that the target has sampled there."""

    sampled: Tensor  # int64 [N]
    input_ids: Tensor  # [N], what the rows were run with; -1 for placeholders
    drafts: Tensor  # [N], the same, and -1 for what a grammar refuses
    starts: Tensor  # int32 [R + 1], first row of each request, then N
    states: Tensor  # int64 [R], state row of each request
    states_np: np.ndarray  # the same
    row_states: Tensor  # [N], state row of each row
    row_places: Tensor  # int32 [N], place of each row in its request
    logits: tuple[Tensor, Tensor]  # [N, V], as the target gave them, and processed


class CoupledSampler(RejectionSampler):
    """vLLM's rejection sampler with another accepting rule; logprobs and masks stay its own."""

    def _verify(
        self,
        logits: Tensor,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        cu_num_logits: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments and results as in vLLM: processed logits [N, V], tokens [R, K + 1], counts [R].

        `draft_logits` is not needed: the drafts' distribution plays no part in the rule.
        """
        sampled, processed_logits = self.sampler.sample(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        verified = self._accept(
            SampledRows(
                sampled,
                draft_sampled,
                verify_draft_sampled,
                cu_num_logits,
                idx_mapping,
                idx_mapping_np,
                expanded_idx_mapping,
                expanded_local_pos,
                (logits, processed_logits),
            )
        )
        return processed_logits, verified.tokens, verified.num_tokens

    def _accept(self, rows: SampledRows) -> Verification:
        """Follow each request's chain while its drafts equal what was sampled."""
        most = self.num_speculative_steps + 1
        return follow(rows.sampled, rows.drafts, rows.starts, most)
