"""What our changes of the CPU's runner and executor rely on inside vLLM; see `relied_on`."""

from __future__ import annotations

from vllm_specformer.engine.compat.symbols import (
    CARRIED,
    CLASS,
    CPU_SAMPLING,
    CPU_SYNTHETIC,
    DRAFTLESS,
    LATE_STORE,
    Reliance,
    call,
    members,
)

_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_EXECUTOR = "vllm.v1.executor.multiproc_executor:MultiprocExecutor"

CPU_RUNNER: tuple[Reliance, ...] = (
    call(
        "vllm.utils.cpu_triton_utils:_expand_kernel_impl",
        CPU_SAMPLING,
        "repaired on a CPU",
        "output input_val cu_num_tokens replace_from replace_to",
    ),
    call(
        "vllm.utils.cpu_triton_utils:_rejection_greedy_sample_kernel_impl",
        CPU_SYNTHETIC,
        "repaired on a CPU",
        "output_token_ids cu_num_draft_tokens draft_token_ids target_argmax bonus_token_ids "
        "is_greedy max_spec_len uniform_probs synthetic_conditional_rates SYNTHETIC_MODE",
    ),
    call(
        "vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl",
        CPU_SYNTHETIC,
        "repaired on a CPU",
        "output_token_ids cu_num_draft_tokens draft_token_ids draft_probs target_probs "
        "bonus_token_ids recovered_token_ids uniform_probs is_greedy max_spec_len vocab_size "
        "synthetic_conditional_rates NO_DRAFT_PROBS SYNTHETIC_MODE",
    ),
    call(
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only",
        CPU_SAMPLING,
        "repaired on a CPU",
        "logits k",
    ),
    Reliance("vllm.v1.worker.cpu_model_runner:CPUModelRunner", CPU_SAMPLING, "repaired", CLASS),
    call(
        f"{_RUNNER_V1}._bookkeeping_sync",
        CPU_SAMPLING,
        "repaired on a CPU",
        "scheduler_output sampler_output logits hidden_states num_scheduled_tokens",
    ),
    call(
        f"{_RUNNER_V1}.sample_tokens",
        CARRIED,
        "wrapped on a CPU: the drafts leave with the output",
        "grammar_output",
    ),
    call(f"{_RUNNER_V1}.take_draft_token_ids", CARRIED, "gives the drafts of the last step"),
    *members(_RUNNER_V1, CARRIED, "whether the model has stepped", "execute_model_state"),
    call(f"{_EXECUTOR}.sample_tokens", CARRIED, "wrapped: keeps the drafts", "grammar_output"),
    call(f"{_EXECUTOR}.take_draft_token_ids", CARRIED, "wrapped: gives the drafts kept"),
    call(
        "vllm.v1.engine.core:EngineCore.post_step",
        CARRIED,
        "asks for drafts after every step",
        "model_executed",
    ),
    call(
        f"{_RUNNER_V1}.execute_model",
        DRAFTLESS,
        "wrapped on a CPU: no layout for verification where nothing is verified",
        "scheduler_output intermediate_tensors",
    ),
    *members(
        "vllm.v1.worker.gpu_model_runner:ExecuteModelState",
        DRAFTLESS,
        "the step's layout",
        "spec_decode_metadata",
    ),
    *members(
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        DRAFTLESS,
        "drafts of each request",
        "num_draft_tokens",
    ),
    call(
        "vllm.v1.executor.multiproc_executor:WorkerProc.handle_output",
        LATE_STORE,
        "wrapped: K/V are stored after it",
        "output",
    ),
    *members(
        "vllm.v1.executor.multiproc_executor:WorkerProc", LATE_STORE, "whose output", "worker"
    ),
    *members("vllm.v1.worker.worker_base:WorkerWrapperBase", LATE_STORE, "whose output", "worker"),
    *members(_RUNNER_V1, LATE_STORE, "what stores", "drafter"),
    *members(
        "vllm.config.parallel:ParallelConfig",
        LATE_STORE,
        "whether the worker is a process of its own",
        "distributed_executor_backend world_size",
    ),
    *members("vllm.config.vllm:VllmConfig", LATE_STORE, "when it is left", "kv_transfer_config"),
    *members(_RUNNER_V1, DRAFTLESS, "when it is left alone", "use_async_scheduling"),
    call(f"{_RUNNER_V1}._sample", CPU_SAMPLING, "repaired on a CPU", "logits spec_decode_metadata"),
    *members(_RUNNER_V1, CPU_SAMPLING, "which samples are thrown away", "discard_request_mask"),
)
