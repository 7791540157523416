"""The draft step on our Triton kernels inside the real V2 runner, and without a host read.

A value read back to the host stalls a GPU and cannot be captured in a graph. On the CPU the public
kernels would pick their PyTorch references, which may read values; here the Triton launchers take
their place, as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from v1.engines import (
    HEAD,
    DenseReference,
    Tokens,
    continuations,
    drafting,
    greedy,
    make_head,
)
from vllm import SamplingParams

from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

from .support import LONG, MAX_TOKENS, TEXTS, K, assert_all_equal, engine, watching
from .triton_ops import OUR_KERNELS, use_triton

# Methods of a tensor that make the host wait for its values and that dispatch no operator on a CPU.
READING_METHODS = ("tolist", "numpy", "cpu", "__array__")
READING_OPERATORS = {
    "_local_scalar_dense",  # item(), int(), float(), bool(), an index or a slice bound
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
}


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators = 0
        self._paused = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        name = func.overloadpacket.__name__
        if name in READING_OPERATORS:
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.found["boolean index"] += 1
        # Its output has as many rows as the values say, unless the caller gave the number.
        if func is torch.ops.aten.repeat_interleave.Tensor and not (kwargs or {}).get(
            "output_size"
        ):
            self.found["repeat_interleave"] += 1
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        self._paused = False
        try:
            with self:
                yield
        finally:
            self._paused = True

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """For the interpreter, which reads a kernel's tensors as no compiled kernel would."""
        was, self._paused = self._paused, True
        try:
            with _disable_current_modes():
                yield
        finally:
            self._paused = was

    def patch_methods(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in READING_METHODS:
            monkeypatch.setattr(Tensor, name, self._counted(name, getattr(Tensor, name)))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._paused:
                self.found[name] += 1
            return method(tensor, *args, **kwargs)

        return counted


def test_our_triton_kernels_inside_vllm(
    reference: DenseReference, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Undone before the comparison: the dense head must stay on PyTorch.
    with monkeypatch.context() as patches:
        launches = use_triton(patches)
        with engine(drafting(K)) as llm, watching(llm, answers) as watch:
            outputs = llm.generate([*TEXTS[:5], LONG[0]], greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    print(f"launches {dict(launches)}; ", end="")
    assert set(launches) == OUR_KERNELS
    # Two attentions a step: the anchor over the context, then the slots.
    assert launches["_block_attention_kernel"] == 2 * watch.requests.total()
    # Keys, values and the anchors' queries are one launch.
    assert launches["_kv_store_kernel"] == watch.requests.total()
    assert_all_equal(reference, watch, at_least=60)


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x[0]),
    "slice bound": lambda x: x[: x[0]],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean mask": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.clone().__setitem__(x > 0, x[0]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeats": lambda x: x.repeat_interleave(x),
}


@pytest.mark.parametrize("name", READS)
def test_the_counter_sees_a_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, tensor = HostReads(), torch.arange(4)
    reads.patch_methods(monkeypatch)
    with reads.counting():
        tensor.clone().add_(1)
    assert reads.found.total() == 0
    with reads.counting():
        READS[name](tensor)
    assert reads.found.total() > 0
    seen = reads.found.total()
    with reads.counting(), reads.pausing():
        READS[name](tensor)
    assert reads.found.total() == seen


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_no_host_read_in_a_step(
    method: str, tmp_path: Path, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn drafts come from a head with all that a head may have."""
    head = HEAD
    if method == "probabilistic":
        everything = {"num_slot_layers": 2, "draft_vocab_size": 700, "markov_rank": 8}
        head = make_head(tmp_path / "head", "default", **everything)
    reads = HostReads()
    reads.patch_methods(monkeypatch)
    launches = use_triton(monkeypatch, reads.pausing)
    propose, steps = SpecFormerSpeculator.propose, Counter[bool]()

    def counted(self: SpecFormerSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        steps[bool((args[4] == 0).any())] += 1
        with reads.counting():
            return propose(self, batch, *args, **kwargs)

    monkeypatch.setattr(SpecFormerSpeculator, "propose", counted)
    sampled = SamplingParams(temperature=0.8, max_tokens=6, seed=1)
    speculative = drafting(K, head, draft_sample_method=method)
    with engine(speculative, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(
            [*TEXTS[:4], LONG[0]], [greedy(8)] * 3 + [sampled] * 2, use_tqdm=False
        )
    found = continuations(outputs[:3])
    assert all(answers[p][: len(t)] == t for p, t in found.items())
    print(
        f"{steps.total()} steps, {steps[True]} with a cut prompt, {reads.operators} operators, "
        f"{launches.total()} launches, reads {dict(reads.found)}"
    )
    assert steps[True] > 0
    assert steps[False] > 0
    assert launches.keys() >= OUR_KERNELS
    assert ("_gumbel_sample_kernel" in launches) == (method == "probabilistic")
    assert reads.operators > 100 * steps.total()
    assert reads.found == Counter()
