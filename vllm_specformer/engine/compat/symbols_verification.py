"""What we rely on in vLLM where drafts are verified, on both runners."""

from __future__ import annotations

from vllm_specformer.engine.compat.symbols import (
    COUPLED,
    CUT_V2,
    DRAFTERS,
    DRAWS_V2,
    ESTIMATOR,
    V2,
    Reliance,
    call,
    members,
    override,
)

_DRAFT_V2 = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_ESTIMATOR = "vllm.v1.worker.gpu.spec_decode.acceptance_estimator:OnlineAcceptanceEstimator"
_MANAGER = "vllm.v1.worker.gpu.spec_decode.adaptive_verification:AdaptiveVerificationManager"
_SAMPLER_V2 = "vllm.v1.worker.gpu.sample.sampler:Sampler"
_REJECTION_V2 = "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler"

VERIFICATION: tuple[Reliance, ...] = (
    override(
        f"{_REJECTION_V2}.__init__", DRAFTERS, "tells the config", "sampler spec_config device"
    ),
    override(
        f"{_REJECTION_V2}._verify",
        COUPLED,
        "the accepting rule",
        "logits draft_logits draft_sampled pos cu_num_logits idx_mapping idx_mapping_np "
        "expanded_idx_mapping expanded_local_pos seq_lens_upper_bound_np verify_draft_sampled",
    ),
    call(
        f"{_SAMPLER_V2}.sample",
        COUPLED,
        "draws a row's token as without speculation",
        "logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids expanded_local_pos "
        "seq_lens_upper_bound_np",
    ),
    call(
        "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample",
        DRAWS_V2,
        "draws drafts with the target's noise",
        "logits expanded_idx_mapping temperature seed pos apply_temperature is_drafting use_fp64",
    ),
    call(
        f"{_DRAFT_V2}._maybe_predict_acceptance",
        DRAWS_V2,
        "tells adaptive verification how sure the head is; sample_draft's own call does nothing",
        "logits idx_mapping draft_step",
    ),
    *members(_DRAFT_V2, V2, "what tells the chances", "acceptance_estimator"),
    call(
        f"{_ESTIMATOR}.__init__",
        ESTIMATOR,
        "keeps features and chances by request",
        "max_num_reqs num_speculative_steps device",
    ),
    override(
        f"{_ESTIMATOR}.predict",
        ESTIMATOR,
        "log-odds to chances",
        "logits idx_mapping draft_step confidence_probs temperature",
    ),
    override(
        f"{_ESTIMATOR}.step",
        ESTIMATOR,
        "learns from the target's verdict",
        "idx_mapping num_sampled num_rejected",
    ),
    *members(
        _ESTIMATOR,
        ESTIMATOR,
        "its curve and what it keeps",
        "slope intercepts features predictions num_speculative_steps device",
    ),
    call(
        f"{_MANAGER}.__init__",
        CUT_V2,
        "keeps the chances of a batch",
        "req_states query_start_loc num_bonus_tokens max_total_logits",
    ),
    override(
        f"{_MANAGER}.get_num_tokens",
        CUT_V2,
        "chooses a step's budget",
        "num_tokens_per_req draft_tokens",
    ),
    override(f"{_MANAGER}.batches_to_profile", CUT_V2, "measures costs", "capture_sizes"),
    override(f"{_MANAGER}.set_initial_cost_curves", CUT_V2, "takes them", "samples"),
    *members(
        _MANAGER,
        CUT_V2,
        "the chances that the host knows, and the step's budget",
        "_stale_confidences _stale_idx _batch_budget cost_tables req_states num_speculative_steps",
    ),
)
