"""Trees on the Triton kernels inside the V2 runner: no host read, no late compile, fixed addresses.

See tests/engine/v2/test_host_reads.py for what counts as a read, and test_graph_ready.py for what a
graph demands.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from vllm import SamplingParams

from support.engines import drafting, greedy
from support.outputs import Tokens, continuations, counting
from support.v2.engines import LONG, TEXTS, engine, speculator
from support.v2.host_reads import HostReads
from support.v2.triton_ops import OUR_KERNELS, use_tree_triton
from vllm_specformer.engine.candidates import sampler
from vllm_specformer.engine.candidates.attention import TreeAttention
from vllm_specformer.engine.candidates.speculator import CandidateSpeculator
from vllm_specformer.engine.candidates.trees import CandidateTrees

TREE_KERNELS = {
    "_place_trees_kernel",
    "_tree_paths_kernel",
    "_kv_compact_kernel",
    "_follow_kernel",
    "_select_tree_kernel",
}


def test_no_step_waits_for_the_device(
    answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = HostReads()
    reads.patch(monkeypatch)
    launches = use_tree_triton(monkeypatch, reads.pausing)
    calls: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            with reads.counting():
                return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("place", "candidates", "accept", "admit"):
        watch(CandidateTrees, name)
    watch(sampler, "follow")
    watch(CandidateSpeculator, "propose")
    watch(sampler, "_put_paths_first")
    sampled = SamplingParams(temperature=0.8, max_tokens=6, seed=1, logprobs=1)
    jobs = [*TEXTS[:4], LONG[0]], [greedy(8)] * 3 + [sampled] * 2
    with (
        engine(drafting(8, tree_nodes=16), max_num_batched_tokens=96) as llm,
        counting(llm) as counted,
    ):
        speculator(llm)._layers.alike()  # the warm-up of a GPU's worker looks the layers up
        outputs = llm.generate(*jobs, use_tqdm=False)
    found = continuations(outputs[:3])
    assert all(answers[p][: len(t)] == t for p, t in found.items())
    print(f"{dict(calls)}, {reads.operators} operators, {dict(launches)}, {dict(reads.found)}")
    assert counted.tokens_per_step > 1.5
    assert min(calls.values()) > 3
    assert len(calls) == 7
    # A tree's candidates take the Markov term as they are chosen.
    assert launches.keys() >= OUR_KERNELS - {"_markov_bias_kernel"} | TREE_KERNELS
    assert reads.operators > 100
    assert reads.found == Counter()


def test_what_graphs_read_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed target reads positions, masks and lengths where they were captured."""
    seen: list[tuple[int, ...]] = []
    forward = TreeAttention.forward

    def watched(self: TreeAttention, *args: Any, **kwargs: Any) -> Tensor:
        assert self.trees is not None
        step = (args[5].query_start_loc, self.trees.row_mask, self.trees.context_lens)
        seen.append(tuple(tensor.data_ptr() for tensor in step))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TreeAttention, "forward", watched)
    with engine(drafting(8, tree_nodes=16)) as llm:
        table = speculator(llm).trees.table
        before = [tensor.data_ptr() for tensor in table]
        llm.generate([*TEXTS[:4], LONG[0]], [greedy(4 + n) for n in range(5)], use_tqdm=False)
        assert [tensor.data_ptr() for tensor in table] == before
    assert len(seen) > 10
    assert len(set(seen)) == 1


def test_eager_requests_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_warm_up.py has it for chains."""
    from engine.v2.test_warm_up import warm_up

    variants: set[str] = set()
    use_tree_triton(monkeypatch, _disable_current_modes, variants)
    schedule = [[1, 2, 16], [3, 5, 6], [6, 8, 0]]
    config = drafting(8, tree_nodes=16, tree_nodes_per_batch_size=schedule)
    with engine(config, max_num_batched_tokens=96) as llm:
        started = variants.copy()
        variants.clear()
        params = [greedy(3 + n) for n in range(7)]
        llm.generate([*TEXTS[:6], LONG[1]], params, use_tqdm=False)
        served = variants.copy()
        variants.clear()
        warm_up(llm, monkeypatch)
    assert served - started
    missing = sorted(served - variants)
    assert missing == [], (missing[0], [v for v in variants if v[:12] == missing[0][:12]])
