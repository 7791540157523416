"""`draft_confidence_threshold` on the V2 runner: vLLM's adaptive verification with our budget.

vLLM decides in each step how many drafts of the batch are verified, and the device which: the
likeliest. There the number follows from what rows cost; here it is how many drafts were at least as
likely as the threshold asks, in the last step whose chances the host has. So steps can be planned
before their drafts are known, and every row that is computed verifies a draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from vllm_specformer.engine.speculative_config import (
    CONFIDENCE,
    Thresholds,
    confidence_ranges,
    threshold_at,
)
from vllm_specformer.errors import SpeculativeConfigError

REMEDY = (
    "leave the field out; or cut on the V1 runner: VLLM_USE_V2_MODEL_RUNNER=0 and "
    "--no-async-scheduling"
)


class ThresholdManager(AdaptiveVerificationManager):
    """Verifies as many drafts as are likelier than the threshold of the step's batch size."""

    # Drafts and other rows by request, and the budget, of the step that is being laid out.
    _batch_budget: tuple[dict[str, int], dict[str, int], int] | None

    def __init__(self, ranges: Thresholds, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranges = ranges
        self.set_initial_cost_curves([])

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """None: what rows cost makes no difference."""
        return iter(())

    def set_initial_cost_curves(self, samples: list[Any]) -> None:
        """Rows that cost nothing: vLLM's own budget, which is not used, is all drafts."""
        self.cost_tables = (
            np.zeros(self.req_states.max_num_reqs + 1),
            np.ones(self.req_states.max_num_batched_tokens + 1),
        )

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        """Rows of the step; the budget is kept for `reallocate_drafts`, as by the base class."""
        super().get_num_tokens(num_tokens_per_req, draft_tokens)
        assert self._batch_budget is not None
        drafts, others, most = self._batch_budget
        states = [self.req_states.req_id_to_index[name] for name in drafts]
        chances = self._stale_confidences[self._stale_idx].np[states].astype(np.float64)
        wanted = np.fromiter(drafts.values(), dtype=np.int64)[:, None]
        kept = np.cumprod(chances, axis=1) >= threshold_at(self.ranges, len(drafts))
        kept &= np.arange(self.num_speculative_steps) < wanted
        budget = min(int(kept.sum()), most)
        self._batch_budget = drafts, others, budget
        return sum(others.values()) + budget


def check_cut(vllm_config: Any) -> None:
    """Refuse engines whose V2 runner cannot cut drafts, before any weights are loaded.

    Raises:
        SpeculativeConfigError: names the first thing that stands against it.
    """
    problem = next(_problems(vllm_config), None)
    if problem is not None:
        raise refusal(vllm_config.speculative_config, problem)


def refusal(speculative_config: Any, problem: str) -> SpeculativeConfigError:
    """The error for a threshold that cannot be had with something."""
    ranges = [list(entry) for entry in confidence_ranges(speculative_config)]
    return SpeculativeConfigError(
        f"speculative config: {CONFIDENCE}={ranges} cannot be combined on the V2 runner with "
        f"{problem}",
        REMEDY,
    )


def _problems(vllm_config: Any) -> Iterator[str]:
    if vllm_config.lora_config is not None:
        yield "LoRA adapters, whose rows are told apart before the drafts are known"
    mode = vllm_config.compilation_config.cudagraph_mode
    if not mode.has_full_cudagraphs():
        yield (
            f"cudagraph_mode={mode.name}, as --enforce-eager has it: steps of many lengths need "
            "full CUDA graphs (FULL_AND_PIECEWISE, the default)"
        )
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        yield "enable_batch_sharded_sampling, which splits rows before the drafts are known"
    if vllm_config.model_config.return_sampling_mask:
        yield "the replay of sampling distributions, which needs as many rows in every step"
    if getattr(getattr(vllm_config, "aux_output_config", None), "enabled", False):
        yield "auxiliary outputs, which are handed out row by row"
