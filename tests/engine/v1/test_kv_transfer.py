"""A connector that moves the cache layer by layer moves the head's layer, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from support.dense import DenseReference
from support.drafts import compare, watching
from support.engines import Job, drafting, engine, greedy, prompts, run_plain
from support.heads import make_head
from support.outputs import counting, token_ids

# Several blocks each, so that whole blocks are found outside.
JOB = Job(["\n\n\n".join(prompts()[i : i + 4]) for i in range(3)], greedy(24))


@pytest.fixture(autouse=True)
def no_connector_stays() -> Iterator[None]:
    yield
    ensure_kv_transfer_shutdown()


def example(folder: Path) -> dict[str, Any]:
    """vLLM's own connector, which keeps pages in files."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "layers", "connectors"), [(2, 1, 1), (4, 2, 1), (2, 1, 2)])
def test_the_head_finds_its_context_in_what_was_loaded(
    kv_heads: int, layers: int, connectors: int, tmp_path: Path
) -> None:
    """Pages that were not moved would be another request's or empty, and drafts would show it."""
    several = [example(tmp_path / f"pages{number}") for number in range(connectors)]
    connector = several[0]
    if connectors > 1:
        extra = {"connectors": several}
        connector = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
    expected = token_ids(run_plain({"all": JOB})["all"])
    head = make_head(tmp_path / "head", "default", num_key_value_heads=kv_heads)
    # Without vLLM's own prefix cache, so that the second time everything comes from outside.
    options = {"kv_transfer_config": connector, "enable_prefix_caching": False, "block_size": 32}
    with engine(drafting(4, head), **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        assert len(runner.drafter.model.attn.layers) == layers
        assert token_ids(JOB.run(llm)) == expected
        with watching() as watch, counting(llm) as counted:
            assert token_ids(JOB.run(llm)) == expected
    assert counted["external_prefix_cache_hits"] > 0
    result = compare(DenseReference(head), watch.drafted)
    assert result.wrong == []
    assert result.compared > 50
