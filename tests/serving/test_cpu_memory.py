"""On a CPU an engine reserves memory that is free, unless it is told how much."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from vllm.platforms import current_platform

from vllm_specformer.serving.cpu_memory import (
    fitting_utilization,
    left_in_group,
    memory_options,
    with_memory,
)


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
        "--device-memory-utilization",
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


def test_a_container_has_less_than_its_machine(tmp_path: Path) -> None:
    assert left_in_group(tmp_path) == float("inf")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_group(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("5000\n")
    assert left_in_group(tmp_path) == 4000


def test_nothing_is_added_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert memory_options(["model"]) == []
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    assert memory_options(["model"]) == []
    assert with_memory({"model": "m"}) == {"model": "m"}
