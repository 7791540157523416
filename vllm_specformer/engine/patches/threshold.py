"""Drafts cut by confidence on the V2 runner: through vLLM's adaptive verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import patch
from vllm_specformer.engine.speculative_config import ADAPTIVE, confidence_ranges

_GUARD = 'acts only on "draft_confidence_threshold" in a SpecFormer speculative config'


@patch(
    "vllm.config.vllm:VllmConfig._validate_adaptive_verification",
    why="only there is it known which runner drafts: on V2 a threshold switches on vLLM's adaptive "
    "verification, whose layout of a step it needs, and what that cannot do is refused by the "
    "user's own field",
    guard=_GUARD,
)
def validate(original: Callable[..., None], self: Any) -> None:
    if confidence_ranges(self.speculative_config) is not None and self.use_v2_model_runner:
        from vllm_specformer.engine.confidence.cut_v2 import check_cut

        check_cut(self)
        setattr(self.speculative_config, ADAPTIVE, True)
    original(self)


@patch(
    "vllm.v1.worker.gpu.model_runner:maybe_create_adaptive_verification_manager",
    why="builds the manager whose budget is the number of drafts above the threshold, and names "
    "the user's field where vLLM refuses an attention backend",
    guard=_GUARD,
    imported=True,
)
def create_manager(original: Callable[..., Any], **given: Any) -> Any:
    speculative = given["vllm_config"].speculative_config
    ranges = confidence_ranges(speculative)
    if ranges is None:
        return original(**given)
    from vllm_specformer.engine.confidence.cut_v2 import ThresholdManager, refusal

    try:
        original(**given)  # for its checks
    except ValueError as error:
        raise refusal(speculative, f"this attention ({error})") from None
    names = ("req_states", "query_start_loc", "num_bonus_tokens", "max_total_logits")
    return ThresholdManager(ranges, *(given[name] for name in names))
