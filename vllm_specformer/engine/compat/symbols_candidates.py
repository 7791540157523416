"""What trees of candidates rely on inside vLLM's V2 runner; see `symbols.py`."""

from __future__ import annotations

from vllm_specformer.engine.compat.symbols import CANDIDATES, Reliance, call, members, override

_FLASH = "vllm.v1.attention.backends.flash_attn"
_SAMPLER = "vllm.v1.worker.gpu.sample.sampler:Sampler"

TREES: tuple[Reliance, ...] = (
    override(
        f"{_FLASH}:FlashAttentionImpl.forward",
        CANDIDATES,
        "attention of rows that are trees",
        "layer query key value kv_cache attn_metadata output",
    ),
    *members(
        f"{_FLASH}:FlashAttentionImpl",
        CANDIDATES,
        "shapes, and what trees cannot have",
        "num_heads num_kv_heads head_size scale sliding_window alibi_slopes logits_soft_cap sinks "
        "kv_sharing_target_layer_name",
    ),
    *members(
        f"{_FLASH}:FlashAttentionMetadata",
        CANDIDATES,
        "rows and pages of a batch",
        "num_actual_tokens max_query_len query_start_loc block_table",
    ),
    *members(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        CANDIDATES,
        "where a request's rows and drafts lie",
        "query_start_loc_np cu_num_logits seq_lens num_draft_tokens_per_req",
    ),
    *members(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        CANDIDATES,
        "where batches meet speculator and sampler",
        "speculator rejection_sampler sampler req_states",
    ),
    *members("vllm.config.model:ModelConfig", CANDIDATES, "kind of positions", "uses_mrope"),
    *members(_SAMPLER, CANDIDATES, "samplers of their own noise", "use_flashinfer use_xpu_sampler"),
    *members(
        _SAMPLER,
        CANDIDATES,
        "who wants log-probabilities, who changes logits",
        "sampling_states return_sampling_mask logits_processors",
    ),
    call(
        "vllm.v1.worker.gpu.sample.states:SamplingStates.max_num_logprobs",
        CANDIDATES,
        "whether a batch wants log-probabilities",
        "idx_mapping_np",
    ),
    *members(
        "vllm.sampling_params:SamplingParams",
        CANDIDATES,
        "requests that need chains",
        "presence_penalty frequency_penalty repetition_penalty bad_words thinking_token_budget",
    ),
)
