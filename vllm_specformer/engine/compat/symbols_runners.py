"""What our V1 proposer and V2 speculator rely on inside vLLM; see `symbols.py`."""

from __future__ import annotations

from vllm_specformer.engine.compat.symbols import (
    CLASS,
    CONFIDENCE,
    DRAFT_TIME,
    DRAWS_V2,
    KV_TRANSFER,
    MODEL,
    REQUESTS,
    V1,
    V2,
    Reliance,
    call,
    members,
    override,
)

_DFLASH_V1 = "vllm.v1.spec_decode.dflash:DFlashProposer"
_BASE_V1 = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_DFLASH_V2 = "vllm.v1.worker.gpu.spec_decode.dflash.speculator:DFlashSpeculator"
_DRAFT_V2 = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_DFLASH_GRAPHS = "vllm.v1.worker.gpu.spec_decode.dflash.cudagraph:DFlashCudaGraphManager"
_BATCH_V2 = "vllm.v1.worker.gpu.input_batch"

RUNNER_V1: tuple[Reliance, ...] = (
    override(f"{_DFLASH_V1}.__init__", V1, "called by the runner", "vllm_config device runner"),
    call(
        f"{_BASE_V1}.__init__",
        V1,
        "sets up buffers and configs",
        "vllm_config device pass_hidden_states_to_model runner",
    ),
    call(f"{_BASE_V1}.load_model", V1, "loads the head", "target_model"),
    call(f"{_BASE_V1}._get_model", V1, "builds the head"),
    override(f"{_BASE_V1}._maybe_share_embeddings", V1, "shares", "target_language_model"),
    override(f"{_BASE_V1}._maybe_share_lm_head", V1, "shares", "target_language_model"),
    override(
        f"{_BASE_V1}.initialize_attn_backend",
        V1,
        "finds the head's KV group",
        "kv_cache_config kernel_block_sizes",
    ),
    call(
        f"{_BASE_V1}.build_per_group_and_layer_attn_metadata",
        V1,
        "metadata of the draft layer",
        "common_attn_metadata draft_index",
    ),
    override(
        f"{_BASE_V1}.propose",
        V1,
        "the draft step",
        "num_speculative_tokens target_token_ids target_positions target_hidden_states "
        "next_token_ids token_indices_to_sample common_attn_metadata sampling_metadata "
        "mm_embed_inputs num_rejected_tokens_gpu slot_mappings",
    ),
    override(
        f"{_BASE_V1}.dummy_run",
        V1,
        "profiling and warm-up",
        "num_tokens use_cudagraphs is_graph_capturing slot_mappings",
    ),
    override(
        f"{_BASE_V1}.prepare_inputs_padded",
        V1,
        "gives the last accepted rows",
        "common_attn_metadata spec_decode_metadata valid_sampled_tokens_count",
    ),
    override(
        f"{_BASE_V1}.prepare_next_token_ids_padded",
        V1,
        "gives the bonus tokens",
        "sampled_token_ids requests gpu_input_batch discard_request_mask",
    ),
    call(
        "vllm.v1.sample.sampler:Sampler.greedy_sample",
        V1,
        "what it calls on a CPU chooses greedy drafts there",
        "logits",
    ),
    *members(
        _BASE_V1,
        V1,
        "read or set by our proposer",
        "vllm_config speculative_config draft_model_config device num_speculative_tokens "
        "hidden_size dtype max_batch_size max_num_tokens max_model_len kv_cache_gid "
        "draft_attn_groups model _draft_attn_layer_names _last_draft_probs "
        "_enable_probabilistic_draft_probs",
    ),
    call(
        f"{_RUNNER_V1}._input_fits_in_drafter",
        V1,
        "skips drafting for a whole batch near the maximum length",
        "common_attn_metadata",
    ),
    *members(_RUNNER_V1, V1, "lifts that limit", "effective_drafter_max_model_len"),
    *members(_RUNNER_V1, V1, "where the tokens of a step are in their texts", "positions"),
    call(f"{_RUNNER_V1}.update_max_model_len", V1, "resets that limit", "max_model_len"),
    call(
        f"{_RUNNER_V1}._get_draft_token_ids_cpu",
        CONFIDENCE,
        "takes drafts as lists of any length",
    ),
    call(
        f"{_RUNNER_V1}._get_spec_decode_draft_probs",
        CONFIDENCE,
        "takes the probabilities of as many drafts as a request has",
        "spec_decode_metadata",
    ),
    *members(_RUNNER_V1, V1, "how each row of a batch is drawn", "requests"),
    *members("vllm.v1.worker.gpu_input_batch:InputBatch", V1, "whose rows they are", "req_ids"),
    *members(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        V1,
        "how each row of a batch is drawn",
        "sampling_params generator",
    ),
    *members(
        "vllm.sampling_params:SamplingParams",
        V1,
        "whose drafts are drawn",
        "temperature top_k top_p seed structured_outputs",
    ),
    *members(
        "vllm.config.scheduler:SchedulerConfig",
        CONFIDENCE,
        "tells whether a step is planned before the drafts are known",
        "async_scheduling",
    ),
)

RUNNER_V2: tuple[Reliance, ...] = (
    override(f"{_DFLASH_V2}.__init__", V2, "called by init_speculator", "vllm_config device"),
    override(
        f"{_DFLASH_V2}.propose",
        V2,
        "the draft step",
        "input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled "
        "num_rejected last_sampled next_prefill_tokens temperature seeds dp_sync_state dummy_run "
        "skip_attn_for_dummy_run mm_inputs is_profile num_speculative_tokens",
    ),
    override(
        f"{_DFLASH_V2}.load_draft_model",
        V2,
        "builds the head",
        "target_model target_attn_layer_names",
    ),
    override(
        f"{_DFLASH_V2}.set_attn",
        V2,
        "finds the head's KV group",
        "model_state kv_cache_config block_tables target_input_buffers target_attn_groups",
    ),
    override(f"{_DFLASH_V2}.init_cudagraph_manager", V2, "graph mode", "cudagraph_mode"),
    override(f"{_DFLASH_V2}.capture", V2, "captures the draft step"),
    *members(
        _DFLASH_V2,
        V2,
        "read or set by our speculator",
        "num_query_per_req query_cudagraph_manager hidden_states context_positions sample_pos "
        "sample_idx_mapping sample_col _speculator_name",
    ),
    override(
        f"{_DFLASH_V2}._generate_draft",
        V2,
        "called by the graph manager",
        "num_reqs num_tokens_padded attn_metadata slot_mappings num_tokens_across_dp "
        "cudagraph_runtime_mode",
    ),
    override(
        f"{_DFLASH_V2}._prepare_graph_forward",
        V2,
        "called by the graph manager",
        "num_reqs attn_metadata",
    ),
    override(
        f"{_DFLASH_V2}._num_graph_context_tokens",
        V2,
        "0.33 calls it in __init__",
        "num_reqs",
    ),
    override(
        f"{_DRAFT_V2}.compute_draft_logits",
        DRAWS_V2,
        "sample_draft is given logits",
        "hidden_states spec_step_idx",
    ),
    call(f"{_DRAFT_V2}.__init__", V2, "sets up buffers", "vllm_config device"),
    override(f"{_DRAFT_V2}.load_model", V2, "calls load_draft_model", "target_model"),
    call(
        f"{_DRAFT_V2}.set_attn",
        V2,
        "builds the draft's attention groups",
        "model_state kv_cache_config block_tables target_input_buffers target_attn_groups",
    ),
    call(
        f"{_DRAFT_V2}.sample_draft",
        DRAWS_V2,
        "draws the drafts and keeps q",
        "hidden_states sample_src_positions idx_mapping temperature seeds draft_step draft_logits "
        "spec_step_idx",
    ),
    call(
        f"{_DRAFT_V2}._build_uniform_batch_dp_sync",
        V2,
        "agrees on the batch across data-parallel ranks",
        "target_dp_sync_state num_reqs num_query_per_req",
    ),
    *members(
        _DRAFT_V2,
        V2,
        "read by our speculator; max_model_len is read-only from 0.33 on",
        "vllm_config speculative_config draft_model_config device dtype num_speculative_steps "
        "max_num_reqs max_num_tokens max_model_len draft_max_seq_len input_buffers idx_mapping "
        "temperature seeds draft_tokens draft_logits dp_size dp_rank model attn_groups "
        "attn_cg_support block_tables kv_cache_config draft_attn_layer_names supports_mm_inputs",
    ),
    *members(
        "vllm.config.model:ModelConfig",
        MODEL,
        "keeps the head's parameters through sleep of level 2",
        "sleep_preserve_parameter_names",
    ),
    call(
        "vllm.v1.spec_decode.dynamic.utils:build_dynamic_sd_schedule_lookup",
        V2,
        "drafts by batch size, as the scheduler reads them",
        "num_speculative_tokens_per_batch_size vllm_max_batch_size vllm_num_speculative_tokens",
    ),
    call(
        "vllm.config.speculative:SpeculativeConfig.uses_dynamic_speculative_decoding",
        V2,
        "whether there is a schedule",
    ),
    *members(
        "vllm.config.compilation:CompilationConfig",
        V2,
        "sizes of the captured batches",
        "cudagraph_capture_sizes",
    ),
    Reliance(_DFLASH_GRAPHS, V2, "replays the draft step", CLASS, bases=("CudaGraphManager",)),
    call(
        f"{_DFLASH_GRAPHS}.capture",
        V2,
        "captures the draft step",
        "forward_fn input_buffers block_tables attn_groups kv_cache_config max_model_len causal "
        "prepare_forward progress_bar_desc",
    ),
    call(
        f"{_GRAPHS}:CudaGraphManager.__init__",
        V2,
        "one graph per batch size",
        "vllm_config device cudagraph_mode decode_query_len",
    ),
    call(f"{_GRAPHS}:CudaGraphManager.run_fullgraph", V2, "replays", "desc"),
    *members(
        f"{_GRAPHS}:BatchExecutionDescriptor",
        V2,
        "what was dispatched",
        "cg_mode num_tokens num_reqs",
    ),
    call(
        "vllm.v1.worker.gpu.dp_utils:dispatch_cg_and_sync_dp",
        V2,
        "picks graph or eager",
        "cudagraph_manager num_reqs num_tokens uniform_token_count dp_size dp_rank need_eager "
        "dp_sync_state",
    ),
    *members(
        "vllm.v1.worker.gpu.dp_utils:DPSyncState",
        V2,
        "batch agreed across data-parallel ranks",
        "num_tokens_across_dp num_reqs",
    ),
    *members(
        f"{_BATCH_V2}:InputBatch",
        V2,
        "the target's batch",
        "num_reqs num_tokens num_draft_tokens idx_mapping idx_mapping_np positions query_start_loc "
        "seq_lens_cpu_upper_bound",
    ),
    *members("vllm.v1.worker.gpu.states:RequestState", V2, "whose row", "req_id_to_index"),
    *members("vllm.v1.core.sched.output:SchedulerOutput", V2, "who is new", "scheduled_new_reqs"),
    *members("vllm.v1.core.sched.output:NewRequestData", V2, "new", "req_id sampling_params"),
    *members(f"{_BATCH_V2}:InputBuffers", V2, "draft inputs", "positions query_start_loc"),
    *members(f"{_BATCH_V2}:InputBuffers", V2, "draft inputs", "seq_lens is_padding"),
    call(
        "vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils:get_eagle3_aux_layers_from_config",
        V2,
        "which hidden states the target returns",
        "spec_config",
    ),
    call(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        MODEL,
        "packs the head's matrices on a CPU",
        "layer remove_weight",
    ),
    *members(
        "vllm.config.parallel:ParallelConfig",
        DRAFT_TIME,
        "which worker counts the draft time",
        "rank data_parallel_index",
    ),
    *(
        call(f"vllm.distributed.kv_transfer.kv_transfer_state:{name}", KV_TRANSFER, "the connector")
        for name in ("get_kv_transfer_group", "has_kv_transfer_group", "is_v1_kv_transfer_group")
    ),
    call(f"{_CONNECTOR}.has_connector_metadata", KV_TRANSFER, "whether it takes part in this step"),
    call(f"{_CONNECTOR}.wait_for_layer_load", KV_TRANSFER, "the head's pages loaded", "layer_name"),
    call(
        f"{_CONNECTOR}.save_kv_layer",
        KV_TRANSFER,
        "the head's pages saved",
        "layer_name kv_layer attn_metadata",
    ),
    *members(
        "vllm.v1.sample.metadata:SamplingMetadata",
        REQUESTS,
        "drafts before a bonus token; processors of its logits",
        "spec_token_ids logitsprocs",
    ),
    *members(
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor",
        REQUESTS,
        "requests below their minimum",
        "min_toks",
    ),
    *members(
        "vllm.sampling_params:SamplingParams", REQUESTS, "what is refused", "logprob_token_ids"
    ),
)
