"""Connectors that keep pages outside of the cache keep those of the head's layers, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from support.cpu_offloading import OFFLOADING
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


def two_examples(folder: Path) -> dict[str, Any]:
    several = [example(folder / name) for name in ("first", "second")]
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": several},
    }


def offloading(folder: Path) -> dict[str, Any]:
    """vLLM's offloading into main memory; only its CUDA copies are replaced (see the module)."""
    return OFFLOADING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_heads", "layers", "connector"),
    [
        (2, 1, example),
        (4, 2, example),
        (2, 1, two_examples),
        (2, 1, offloading),
        (4, 2, offloading),
    ],
)
def test_the_head_finds_its_context_in_what_was_loaded(
    kv_heads: int, layers: int, connector: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Pages that were not moved would be another request's or empty, and drafts would show it."""
    expected = token_ids(run_plain({"all": JOB})["all"])
    head = make_head(tmp_path / "head", "default", num_key_value_heads=kv_heads)
    # Without vLLM's own prefix cache, so that the second time everything comes from outside.
    options = {
        "kv_transfer_config": connector(tmp_path / "pages"),
        "enable_prefix_caching": False,
        "block_size": 32,
    }
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
