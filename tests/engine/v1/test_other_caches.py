"""Targets whose KV cache is not what the head's own would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from support.drafts import compare, truth, watching
from support.engines import Job, drafting, engine, greedy, prompts
from support.heads import make_head
from support.outputs import continuations
from support.processor import wants_fp8_cache
from support.seen_states import SeenStates, seeing

JOB = Job(prompts()[:12], greedy(24))


def groups_of(llm: Any) -> list[tuple[int, Any]]:
    """Each KV-cache group's number of layers and spec, as the model runner has them."""
    core = llm.llm_engine.engine_core.engine_core
    config = core.model_executor.driver_worker.worker.model_runner.kv_cache_config
    return [(len(group.layer_names), group.kv_cache_spec) for group in config.kv_cache_groups]


@pytest.mark.parametrize("cache", [pytest.param("fp8", marks=wants_fp8_cache), "fixed sizes"])
@pytest.mark.parametrize("kv_heads", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_drafts(cache: str, kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's K and V keep their dtype; the target's group has its own spec, and layers more."""
    options: dict[str, Any] = {"enable_prefix_caching": False}
    if cache == "fp8":
        options["kv_cache_dtype"] = "fp8_e4m3"
    else:  # the backend's spec is customised then
        sizes = staticmethod(lambda kv_cache_spec=None: [32])
        monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", sizes)
        options["block_size"] = 32
    head = make_head(tmp_path / "head", "default", num_draft_slots=4, num_key_value_heads=kv_heads)
    reference = SeenStates(head)
    with engine(None, **options) as llm:
        alone = groups_of(llm)
        plain = continuations(JOB.run(llm))
    with (
        engine(drafting(4, head), **options) as llm,
        watching(truth(plain)) as watch,
        seeing(reference),
    ):
        ((layers, spec),) = groups_of(llm)
        assert continuations(JOB.run(llm)) == plain
    ((target_layers, target_spec),) = alone
    assert spec == target_spec
    # float32 K and V of as many heads as the target has, or twice as many, in 1 or 4 bytes.
    assert layers - target_layers == kv_heads // 2 * (4 if cache == "fp8" else 1)
    assert min(watch.helped[n] for n in range(5)) > 0
    result = compare(reference, watch.drafted)
    print(f"drafts compared {result.compared}, wrong {len(result.wrong)}, ties {result.ties}")
    assert result.wrong == []
    assert result.compared > 200
    assert result.ties <= result.compared // 100
