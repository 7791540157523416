"""What our changes of the CPU's runner and executor rely on inside vLLM; see `symbols.py`."""

from __future__ import annotations

from vllm_specformer.engine.compat.symbols import (
    CARRIED,
    CPU_SAMPLING,
    DRAFTLESS,
    LATE_STORE,
    Reliance,
    call,
    members,
)

_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

CPU_RUNNER: tuple[Reliance, ...] = (
    call(f"{_RUNNER_V1}.take_draft_token_ids", CARRIED, "gives the drafts of the last step"),
    *members(_RUNNER_V1, CARRIED, "whether the model has stepped", "execute_model_state"),
    call(
        "vllm.v1.engine.core:EngineCore.post_step",
        CARRIED,
        "asks for drafts after every step",
        "model_executed",
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
    *members(_RUNNER_V1, CPU_SAMPLING, "which samples are thrown away", "discard_request_mask"),
)
