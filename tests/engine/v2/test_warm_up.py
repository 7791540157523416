"""An eager engine has compiled all of the head's kernels when its worker has warmed up.

The worker of a CPU warms up in its own way, so these tests call the one that GPUs have.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.v1.worker import gpu_worker

from support.engines import drafting, greedy
from support.v2.drafts import watching
from support.v2.engines import LONG, TEXTS, K, engine, runner, speculator
from support.v2.triton_ops import OUR_KERNELS, use_triton

# Drafts for one request, two, three to five, and more.
SCHEDULE = [[1, 1, K], [2, 2, 2], [3, 5, 1], [6, 8, 0]]


def warm_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's worker for GPUs does with an eager engine before it serves."""
    core: Any = llm.llm_engine.engine_core
    worker = core.engine_core.model_executor.driver_worker.worker
    assert worker.model_runner is runner(llm)
    with monkeypatch.context() as patches:
        # Those of the target, and what this process would keep.
        for name in ("kernel_warmup", "freeze_gc_heap", "enable_gpu_sync_check"):
            patches.setattr(gpu_worker, name, lambda *_: None)
        # As the profile of its memory, which leaves attention out: on a CPU the states are then
        # whatever lies in memory.
        worker.model_runner._dummy_run(8, is_profile=True)
        gpu_worker.Worker.compile_or_warm_up_model(worker)


def test_eager_requests_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of eight requests to one, of prompts of many lengths.

    What is compiled does not depend on the order, so the requests come before the warm-up here: in
    an engine that has not been warmed up they would wait for kernels.
    """
    variants: set[str] = set()
    launches = use_triton(monkeypatch, variants=variants)
    config = drafting(K, num_speculative_tokens_per_batch_size=SCHEDULE)
    with engine(config, enforce_eager=True, max_num_batched_tokens=256) as llm:
        started = variants.copy()
        variants.clear()
        params = [greedy(4 + 2 * n) for n in range(8)]
        with watching(llm) as watch:
            llm.generate([*TEXTS[:7], LONG[1]], params, use_tqdm=False)
        served = variants.copy()
        assert watch.tokens.keys() == {0, 1, 2, K}
        assert launches.keys() >= OUR_KERNELS

        ours = speculator(llm)
        before = [layer.kv_cache.clone() for layer in ours.model.attn.layers]
        variants.clear()
        ours.monitor.observe(4, torch.tensor([4]))
        resets: list[str] = []
        monkeypatch.setattr(ours.clock, "reset", lambda: resets.append("clock"))
        warm_up(llm, monkeypatch)
        assert (ours.monitor._drafted, int(ours.monitor._rejected)) == (0, 0)
        assert resets == ["clock"]
        for layer, pages in zip(ours.model.attn.layers, before, strict=True):
            assert torch.equal(layer.kv_cache, pages)
    assert served - started
    assert sorted(served - variants) == []
