"""What `bench`, `plan` and `eval --engine` rely on in vLLM; serving needs none of it."""

from __future__ import annotations

from vllm_specformer.engine.compat.symbols import Reliance, call, members

CLIENT = "bench/client.py"
MEASURING = "engine/measuring.py"
STEPPED = "serving/engine.py"

MEASURED: tuple[Reliance, ...] = (
    call("vllm.benchmarks.serve:add_cli_args", CLIENT, "the client's own options", "parser"),
    call("vllm.benchmarks.serve:main", CLIENT, "vLLM's benchmark client", "args"),
    *members(
        "vllm.v1.engine.llm_engine:LLMEngine",
        MEASURING,
        "from an engine to its scheduler",
        "engine_core",
    ),
    *members("vllm.v1.engine.llm_engine:LLMEngine", STEPPED, "which runner it has", "vllm_config"),
    *members(
        "vllm.v1.engine.core_client:InprocClient", MEASURING, "to the scheduler", "engine_core"
    ),
    *members("vllm.v1.engine.core:EngineCore", MEASURING, "to the scheduler", "scheduler"),
    *members(
        "vllm.v1.core.sched.scheduler:Scheduler",
        MEASURING,
        "holds a measured engine at a number of drafts",
        "dynamic_sd_lookup",
    ),
)
