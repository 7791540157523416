"""On a CPU an engine reserves memory that is free, unless it is told how much."""

from __future__ import annotations

import psutil
import pytest

from vllm_specformer.serving.cpu_memory import fitting_utilization, memory_options, with_memory


def test_what_is_reserved_is_free() -> None:
    share = fitting_utilization()
    assert share is not None
    memory = psutil.virtual_memory()
    assert 0 < share * memory.total < memory.available


@pytest.mark.parametrize("own", ["gpu_memory_utilization", "kv_cache_memory_bytes"])
def test_an_engine_keeps_what_it_is_told(own: str) -> None:
    assert with_memory({"model": "m", own: 1}) == {"model": "m", own: 1}


def test_an_engine_that_is_not_told_gets_what_fits() -> None:
    found = with_memory({"model": "m", "kv_cache_memory_bytes": None})
    assert 0 < found.pop("gpu_memory_utilization") < 0.92
    assert found == {"model": "m", "kv_cache_memory_bytes": None}


@pytest.mark.parametrize(
    "option",
    [
        "--gpu-memory-utilization",
        "--gpu-memory-utilization=0.5",
        "--kv_cache_memory_bytes=1G",
        "--kv-cache-memory-bytes",
        "--config",
        "--help",
    ],
)
def test_a_server_keeps_what_it_is_told(option: str) -> None:
    assert memory_options(["model", option]) == []


def test_a_server_that_is_not_told_gets_what_fits() -> None:
    name, share = memory_options(["model", "--max-model-len", "512"])
    assert name == "--gpu-memory-utilization"
    assert 0 < float(share) < 0.92
