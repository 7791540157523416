"""A head drafts as before when vLLM has slept, at either level, or loaded its target again.

vLLM's CPU build has no sleep mode, so these tests call the methods of the worker that GPUs have,
with an allocator that really loses what they are to lose. Nothing is packed for a CPU either: a
packed copy would outlive the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm import LLM
from vllm.v1.worker.gpu_worker import Worker

from support.dense import DenseReference
from support.engines import Job, drafting, greedy, run_plain
from support.heads import make_head
from support.outputs import Tokens, continuations
from support.paths import HEAD, TARGET
from support.v2.drafts import Watch, assert_all_equal, watching
from support.v2.engines import MAX_TOKENS, SMALL, TEXTS, K, engine, speculator
from vllm_specformer.engine.model import SpecFormerDraftModel
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

GARBAGE = 0xFF  # in every byte: NaN in any floating type, -1 in integers


class Storages(TorchDispatchMode):
    """All memory that was taken in the block and still is."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {s.data_ptr() for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage.data_ptr() not in given:  # neither a view nor written in place
                reference = StorageWeakRef(storage)
                self._seen[reference.cdata] = reference
        return result

    def alive(self) -> list[Tensor]:
        """As bytes."""
        storages = (
            torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            for reference in self._seen.values()
            if not reference.expired()
        )
        return [torch.empty(0, dtype=torch.uint8).set_(s) for s in storages if s is not None]


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [leaf.untyped_storage() for leaf in leaves if leaf.device.type == "cpu"]


class OnDevice(nn.Parameter):
    """A parameter on a device as the worker sees it: to take it to the host makes a copy."""

    is_cpu = False

    def detach(self) -> Tensor:
        return self.data.clone()


class Allocator:
    """vLLM's backend of sleep mode. Level 1 keeps weights on the host; level 2 loses them."""

    def __init__(self, memory: list[Tensor]) -> None:
        self.memory = memory
        self.kept: list[Tensor] = []

    def suspend(self, level: int = 1) -> None:
        self.kept = [part.clone() for part in self.memory] if level == 1 else []
        for part in self.memory:
            part.fill_(GARBAGE)

    def resume(self, tags: list[str] | None = None) -> None:
        if tags is None or "weights" in tags:
            for part, kept in zip(self.memory, self.kept, strict=False):
                part.copy_(kept)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that a head can own or copy: a draft vocabulary, rows of the lm_head."""
    folder = tmp_path_factory.mktemp("sleep") / "head"
    return make_head(folder, "default", draft_vocab_size=700, num_draft_slots=K)


@pytest.fixture(scope="module")
def memory() -> Storages:
    return Storages()


@pytest.fixture(scope="module")
def llm(head: Path, memory: Storages) -> Iterator[LLM]:
    load = SpecFormerSpeculator.load_draft_model

    def watched(self: SpecFormerSpeculator, *args: Any) -> Any:
        with memory:
            return load(self, *args)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(SpecFormerSpeculator, "load_draft_model", watched)
        patches.setattr(SpecFormerDraftModel, "_pack", lambda self: None)
        with engine(drafting(K, head)) as llm:
            for module in speculator(llm).model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = Tensor._make_subclass(OnDevice, parameter.data)
            yield llm


@pytest.fixture
def worker(llm: LLM, memory: Storages, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine's, with an allocator of all that the head's weights take."""
    core: Any = llm.llm_engine.engine_core
    worker = core.engine_core.model_executor.driver_worker.worker
    worker._sleep_mode_backend = Allocator(memory.alive())
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (1 << 30, 2 << 30))
    return worker


def drafts(llm: LLM) -> Watch:
    llm.reset_prefix_cache()  # as vLLM does where it sleeps
    with watching(llm) as watch:
        llm.generate(TEXTS[:3], greedy(MAX_TOKENS), use_tqdm=False)
    assert len(watch.drafted) >= 10
    return watch


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.data for parameter in model.parameters()]


@pytest.mark.parametrize("level", [1, 2])
def test_drafts_after_sleep(level: int, llm: LLM, worker: Any) -> None:
    model = speculator(llm).model
    before = drafts(llm)
    Worker.sleep(worker, level)
    assert all(tensor.isnan().all() for tensor in parameters(model))
    for layer in model.attn.layers:
        layer.kv_cache.fill_(torch.nan)
    Worker.wake_up(worker, ["kv_cache"])
    assert all(tensor.isnan().all() for tensor in parameters(model))
    Worker.wake_up(worker, ["weights"])
    assert not any(tensor.isnan().any() for tensor in parameters(model))
    assert drafts(llm).drafted == before.drafted


def test_level_2_would_lose_a_head_that_is_not_kept(llm: LLM, worker: Any) -> None:
    patterns = worker.model_config.sleep_preserve_parameter_names
    assert patterns == ["draft.*"]
    model = speculator(llm).model
    kept = [tensor.clone() for tensor in parameters(model)]
    patterns.clear()
    try:
        Worker.sleep(worker, 2)
        Worker.wake_up(worker)
        assert all(tensor.isnan().all() for tensor in parameters(model))
    finally:
        patterns.append("draft.*")
        for tensor, values in zip(parameters(model), kept, strict=True):
            tensor.copy_(values)


def test_a_target_that_is_loaded_again(
    reference: DenseReference, answers: dict[Tokens, Tokens], tmp_path: Path
) -> None:
    """The same weights, then others: the head goes on with the new embedding and logits."""
    other = tmp_path / "other"
    other.mkdir()
    for file in TARGET.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    for name, tensor in weights.items():
        if "norm" in name:
            weights[name] = tensor * 1.25
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    job = Job(TEXTS[:4], greedy(MAX_TOKENS))
    others = continuations(run_plain({"all": job}, **(SMALL | {"model": str(other)}))["all"])
    with engine(drafting(K, HEAD)) as llm:
        for path, texts, dense in (
            (None, answers, reference),
            (str(other), others, DenseReference(HEAD, other)),
        ):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            llm.reset_prefix_cache()
            with watching(llm, texts) as watch:
                outputs = llm.generate(TEXTS[:4], greedy(MAX_TOKENS), use_tqdm=False)
            assert continuations(outputs).items() <= texts.items()
            assert_all_equal(dense, watch, at_least=30)
