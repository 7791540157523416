"""Each public function takes the kernel for a tensor on a GPU and the reference elsewhere."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

# Each public function and its folder.
OPS = {
    op: op
    for op in [
        "block_attention",
        "kv_store",
        "grouped_rms_norm",
        "sample_candidates",
        "tree_candidates",
        "select_tree",
        "kv_compact",
        "verify",
        "rotate_slots",
        "swiglu",
        "markov_bias",
        "draft_inputs",
        "place_trees",
        "tree_paths",
    ]
} | {"follow": "verify", "extend_beam": "select_tree"}
# Launchers that are no files of kernels, too.
LAUNCHERS = {"block_attention": "launch", "verify": "launch"}


def launcher(op: str) -> str:
    return LAUNCHERS.get(OPS[op], "triton_kernel")


def function_of(op: str, module: str = "") -> Callable:
    return getattr(importlib.import_module(f"specformer_kernels.{OPS[op]}{module}"), op)


def make_call(op: str, device: str) -> dict[str, Any]:
    """Arguments that only have a device: the implementations are replaced."""
    tensor = torch.ones(2, device=device)
    shapes: dict[str, Any] = {
        "hidden_states": [tensor],
        "buffers": SimpleNamespace(slot_mapping=tensor),
    }
    return {
        name: shapes.get(name, tensor) for name in inspect.signature(function_of(op)).parameters
    }


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace every implementation by one that notes that it was called."""
    calls: list[str] = []
    for op in OPS:
        for name in ("reference", launcher(op)):
            module = importlib.import_module(f"specformer_kernels.{OPS[op]}.{name}")
            monkeypatch.setattr(module, op, lambda *_, name=name, **__: calls.append(name))
    return calls


@pytest.mark.parametrize("op", OPS)
def test_gpu_takes_the_kernel(op: str, taken: list[str]) -> None:
    with FakeTensorMode():
        function_of(op)(**make_call(op, "cuda"))
    assert taken == [launcher(op)]


@pytest.mark.parametrize("op", OPS)
def test_cpu_takes_the_reference(op: str, taken: list[str]) -> None:
    function_of(op)(**make_call(op, "cpu"))
    assert taken == ["reference"]


@pytest.mark.parametrize("wants", ["weight", "hidden_states"])
def test_gpu_takes_the_kernel_for_gradients_too(wants: str, taken: list[str]) -> None:
    with FakeTensorMode():
        call = make_call("grouped_rms_norm", "cuda")
        leaf = torch.ones(2, device="cuda", requires_grad=True)
        call[wants] = [leaf] if wants == "hidden_states" else leaf
        function_of("grouped_rms_norm")(**call)
    assert taken == ["triton_kernel"]


@pytest.mark.parametrize("op", OPS)
def test_signatures_agree(op: str) -> None:
    public = inspect.signature(function_of(op))
    assert inspect.signature(function_of(op, ".reference")) == public
    assert inspect.signature(function_of(op, f".{launcher(op)}")) == public


@pytest.mark.parametrize("op", ["rotate_slots", "swiglu", "markov_bias"])
def test_gradients_take_the_reference(op: str, taken: list[str]) -> None:
    with FakeTensorMode():
        call = make_call(op, "cuda")
        call[next(iter(call))].requires_grad_()
        function_of(op)(**call)
        with torch.no_grad():
            function_of(op)(**call)
    assert taken == ["reference", "triton_kernel"]


def test_importing_needs_neither_triton_nor_vllm() -> None:
    imports = "; ".join(f"import specformer_kernels.{folder}" for folder in OPS.values())
    code = (
        f"import sys; sys.modules['triton'] = sys.modules['vllm'] = None; {imports}; "
        "assert not any(name.startswith('vllm_specformer') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
