"""Small engines on the V2 runner, their prompts, and what is inside of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from vllm import LLM

from support import engines
from support.engines import Job, greedy, prompts
from support.outputs import Tokens, continuations
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

K = 4
MAX_TOKENS = 10
TEXTS = prompts()[:24]
# Long prompts, each extending the one before: they fill blocks of the prefix cache.
LONG = ["\n\n\n".join(prompts()[60 : 62 + n]) for n in range(3)]

# A step costs the interpreter a program per request and kernel, so everything is small.
SMALL: dict[str, Any] = {
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 384,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 384,
}


def engine(
    speculative: dict[str, Any] | None = None, **changes: Any
) -> AbstractContextManager[LLM]:
    return engines.engine(speculative, **(SMALL | changes))


def plain_answers(texts: Sequence[str], max_tokens: int, **changes: Any) -> dict[Tokens, Tokens]:
    """Greedy continuations by the target alone."""
    job = Job(texts, greedy(max_tokens, **changes))
    return continuations(engines.run_plain({"all": job}, **SMALL)["all"])


def runner(llm: LLM) -> Any:
    """The model runner of an in-process engine."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def speculator(llm: LLM) -> SpecFormerSpeculator:
    return runner(llm).speculator


def groups_of(llm: LLM) -> list[tuple[int, Any]]:
    """Number of layers and spec of each KV-cache group."""
    groups = runner(llm).kv_cache_config.kv_cache_groups
    return [(len(group.layer_names), group.kv_cache_spec) for group in groups]
