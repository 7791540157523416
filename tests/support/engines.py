"""Engines for the tests: start, run jobs, shut down."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from support.paths import HEAD, PROMPTS, TARGET


@cache
def prompts() -> tuple[str, ...]:
    """Beginnings of Python functions that are in no part of the target's training."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["prompt"] for line in lines)


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **changes)


def drafting(num_tokens: int | None = 4, head: Path = HEAD, **changes: Any) -> dict[str, Any]:
    """A speculative config for `head`."""
    config = {"method": "specformer", "model": str(head), **changes}
    return config if num_tokens is None else config | {"num_speculative_tokens": num_tokens}


@contextmanager
def engine(speculative: dict[str, Any] | None = None, **changes: Any) -> Iterator[LLM]:
    """An eager fp32 engine in this process, gone without trace afterwards.

    fp32 makes token ids and drafts comparable exactly; a fixed cache size keeps vLLM from judging
    the machine's free memory.
    """
    arguments: dict[str, Any] = {
        "model": str(TARGET),
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 256 << 20,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(**(arguments | {"speculative_config": speculative} | changes))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


@dataclass
class Job:
    """Prompts that are submitted together, each with its own sampling parameters."""

    prompts: Sequence[str]
    params: SamplingParams | Sequence[SamplingParams]

    def run(self, llm: LLM) -> list[RequestOutput]:
        params = self.params if isinstance(self.params, SamplingParams) else list(self.params)
        return llm.generate(list(self.prompts), params, use_tqdm=False)


def run_plain(jobs: dict[str, Job], **changes: Any) -> dict[str, list[RequestOutput]]:
    """What an engine without speculation answers to each job."""
    with engine(None, **changes) as llm:
        return {name: job.run(llm) for name, job in jobs.items()}


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TARGET)
