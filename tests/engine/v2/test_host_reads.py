"""The draft step on our Triton kernels inside the real V2 runner, and without a host read.

A value read back to the host stalls a GPU and cannot be captured in a graph. On the CPU the public
kernels would pick their PyTorch references, which may read values; here the Triton launchers take
their place, as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from specformer_kernels.verify import Verification, launch
from torch import Tensor
from vllm import SamplingParams

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.heads import make_head
from support.outputs import Tokens, continuations
from support.paths import HEAD
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, K, engine
from support.v2.host_reads import HostReads
from support.v2.triton_ops import OUR_KERNELS, Launched, use_triton
from vllm_specformer.engine import coupled
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator


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
    # vLLM's kernel that draws takes the best tokens of greedy requests, too.
    assert set(launches) == OUR_KERNELS | {"_gumbel_sample_kernel"}
    # Two attentions a step: the anchor over the context, then the slots.
    assert launches["_block_attention_kernel"] == 2 * watch.requests.total()
    # Keys, values and the anchors' queries are one launch.
    assert launches["_kv_store_kernel"] == watch.requests.total()
    assert_all_equal(reference, watch, at_least=60)


def pinned(tensor: Tensor) -> None:
    """Which cannot be had without a device; that it was asked for is what counts."""
    with contextlib.suppress(RuntimeError):
        tensor.pin_memory()


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
    "unique rows": lambda x: x.view(2, 2).unique(dim=0),
    "runs": lambda x: x.unique_consecutive(),
    "counts": lambda x: x.bincount(),
    "drawn": lambda x: x.float().multinomial(1),
    "contained": lambda x: 3 in x,
    "repeats": lambda x: x.repeat_interleave(x),
    "pinned": pinned,
    "host's data": lambda x: x + torch.tensor([1, 2, 3, 4]),
    "index from the host": lambda x: x[torch.as_tensor([0, 1])],
    "host's tensor": lambda x: x + torch.arange(4),
    "to the host": lambda x: x.to("cpu"),
    "waiting": lambda x: torch.cuda.synchronize(),
}

# What looks like one of them and keeps the host out of it.
NO_READS: dict[str, Callable[[Tensor], Any]] = {
    "where": lambda x: torch.where(x > 0, x, 0),
    "mask": lambda x: x.masked_fill(x > 0, 1),
    "index": lambda x: x[x.clamp(max=3)],
    "assignment": lambda x: x.clone().__setitem__(x, x),
    "repeats": lambda x: x.repeat_interleave(2),
    "on the device": lambda x: x + torch.arange(4, device=x.device),
    "as another": lambda x: x.new_zeros(4),
    "type": lambda x: x.to(x.device, torch.float32),
    "slice": lambda x: x[1:3],
}


@pytest.mark.parametrize("name", READS)
def test_the_counter_sees_a_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, tensor = HostReads(), torch.arange(4)
    reads.patch(monkeypatch)
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


@pytest.mark.parametrize("name", NO_READS)
def test_the_counter_sees_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, tensor = HostReads(), torch.arange(4)
    reads.patch(monkeypatch)
    with reads.counting():
        NO_READS[name](tensor)
    assert reads.found == Counter()


@pytest.mark.parametrize("method", ["greedy", "probabilistic", "coupled"])
def test_no_host_read_in_a_step(
    method: str, tmp_path: Path, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn drafts come from a head with all that a head may have; some steps want no draft.

    A sampled request that wants the best tokens is in the first steps.
    """
    head = HEAD
    if method == "probabilistic":
        everything = {"num_slot_layers": 2, "draft_vocab_size": 700, "markov_rank": 8}
        everything |= {"markov_gate": True}
        head = make_head(tmp_path / "head", "default", **everything)
    reads = HostReads()
    reads.patch(monkeypatch)
    launches = use_triton(monkeypatch, reads.pausing)
    propose, steps = SpecFormerSpeculator.propose, Counter[bool]()
    kernel = Launched(launch._follow_kernel, reads.pausing, launches)
    monkeypatch.setattr(launch, "_follow_kernel", kernel)

    def counted(self: SpecFormerSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        steps[bool((args[4] == 0).any())] += 1
        if steps.total() % 4 == 0:
            kwargs["num_speculative_tokens"] = 0
        with reads.counting():
            return propose(self, batch, *args, **kwargs)

    def follow(*args: Any) -> Verification:
        with reads.counting():
            return launch.follow(*args)

    monkeypatch.setattr(SpecFormerSpeculator, "propose", counted)
    monkeypatch.setattr(coupled, "follow", follow)
    sampled = SamplingParams(temperature=0.8, max_tokens=6, seed=1)
    best = SamplingParams(temperature=0.8, max_tokens=3, top_k=1)
    rule = {"verification": "coupled"} if method == "coupled" else {}
    drawn = {"draft_sample_method": "greedy"} if method == "greedy" else {}  # drawn by default
    speculative = drafting(K, head, **drawn, **rule)
    with engine(speculative, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(
            [*TEXTS[:4], LONG[0]], [greedy(8)] * 3 + [best, sampled], use_tqdm=False
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
    # Coupled drafts are drawn as the target's tokens are, which are not counted.
    assert ("_gumbel_sample_kernel" in launches) == (method == "probabilistic")
    assert ("_follow_kernel" in launches) == (method == "coupled")
    assert reads.operators > 100 * steps.total()
    assert reads.found == Counter()
