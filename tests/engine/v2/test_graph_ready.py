"""What a CUDA graph demands of the draft step, shown without a GPU.

The captured part reads the same storages on every step; rows that pad a batch leave no trace; and
the step is replayed or run eagerly as its batch demands. See test_host_reads.py for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.outputs import Tokens, continuations
from support.paths import HEAD
from support.personalities import Replays, poisoned
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, K, engine, speculator
from support.v2.triton_ops import OUR_KERNELS, use_triton
from vllm_specformer.config import read_head_config
from vllm_specformer.engine import speculator_v2
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """By default draft logits are cached; at temperature 0 the drafts are the same."""
    with engine(drafting(K)) as llm:
        assert speculator(llm).draft_logits is not None
        yield llm


def generate(llm: LLM, count: int = 6) -> dict[Tokens, Tokens]:
    """Requests of different lengths, one long prompt among them: batches of several sizes."""
    params = [greedy(MAX_TOKENS - n % 4) for n in range(count)]
    texts = [*TEXTS[: count - 1], LONG[0]]
    return continuations(llm.generate(texts, params, use_tqdm=False))


def assert_parity(found: dict[Tokens, Tokens], answers: dict[Tokens, Tokens]) -> None:
    assert found
    assert all(answers[p][: len(t)] == t for p, t in found.items())


class StoragesRead(TorchDispatchMode):
    """Storages that the watched operators use and did not make themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.external: dict[int, tuple[str, list[int]]] = {}
        self._made: dict[int, Tensor] = {}  # kept alive, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.numel():
                address = leaf.untyped_storage().data_ptr()
                if address not in self._made:
                    self.external[address] = (str(func), list(leaf.shape))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                address = leaf.untyped_storage().data_ptr()
                if address not in self.external:
                    self._made[address] = leaf
        return result


def test_a_moved_storage_would_be_seen() -> None:
    fixed, seen = torch.ones(2), []
    others = [torch.ones(2), torch.ones(2)]
    for other in others:
        with StoragesRead() as storages:
            made = fixed + 1
            made.mul_(2).view(1, 2) * torch.arange(2)
            other.view(1, 2) + made
        seen.append(storages.external.keys())
    fixed_address = fixed.untyped_storage().data_ptr()
    assert seen == [{fixed_address, o.untyped_storage().data_ptr()} for o in others]


class Allocated(TorchDispatchMode):
    """Shapes of the tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        self.shapes |= {tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)}
        return result


def stable_buffers(ours: SpecFormerSpeculator) -> list[Tensor]:
    """All that a captured step reads and writes from outside."""
    own = (ours.hidden_states, ours.sample_col, ours.draft_tokens, ours._block_table)
    return [buffer for buffer in (*own, *ours.inputs) if buffer is not None]


class FakeGraphs(Replays):
    """Graphs that note what they read, and see to it that only the batch's rows are written."""

    def __init__(self, ours: SpecFormerSpeculator, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(ours)
        self.storages: dict[int, list[StoragesRead]] = {}
        self.addresses: set[tuple[int, ...]] = set()
        self.batches: list[list[int]] = []  # the requests' rows of state, step by step
        self.overflowing_steps = 0
        self._requests = self._tokens = 0
        monkeypatch.setattr(speculator_v2, "dispatch_cg_and_sync_dp", self.dispatch)
        monkeypatch.setattr(ours, "query_cudagraph_manager", self)
        run = ours._run

        def observed(requests: int, tokens: int, *args: Any) -> None:
            self._requests, self._tokens = requests, tokens
            self.batches.append(ours.idx_mapping[:requests].tolist())
            before = self._cache().clone()
            logits = None if ours.draft_logits is None else ours.draft_logits.clone()
            run(requests, tokens, *args)
            self._check_writes(before, logits)

        monkeypatch.setattr(ours, "_run", observed)

    def _cache(self) -> Tensor:
        return self.ours.model.attn.layers[0].kv_cache

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> None:
        ours, padded = self.ours, desc.num_reqs
        assert padded is not None
        captured = ours._num_graph_context_tokens(padded)
        self.overflowing_steps += self._tokens > captured
        with StoragesRead() as storages:
            super().run_fullgraph(desc)
        self.storages.setdefault(padded, []).append(storages)
        self.addresses.add(tuple(buffer.data_ptr() for buffer in stable_buffers(ours)))

    def _check_writes(self, before: Tensor, logits: Tensor | None) -> None:
        """Nothing changed in the caches but what the batch's own rows wrote."""
        ours = self.ours
        slots = ours.inputs.slot_mapping[: self._tokens]
        assert (ours.inputs.slot_mapping[self._tokens :] < 0).all()
        assert (slots >= 0).all()
        pages, size = before.shape[0], before.shape[2]
        written = torch.zeros(pages * size, dtype=torch.bool)
        written[slots] = True
        # As bits: poison is not equal to itself.
        changed = self._cache().view(torch.int32) != before.view(torch.int32)
        changed = changed.any(-1).any(1).flatten()
        assert not (changed & ~written).any(), "a row that pads the batch wrote to the cache"
        assert changed.any()
        if logits is not None:
            assert ours.draft_logits is not None
            rows = (ours.draft_logits != logits).any(-1).any(-1).nonzero().flatten().tolist()
            mine = set(ours.idx_mapping[: self._requests].tolist())
            assert set(rows) <= mine, "a row that pads the batch cached logits"
            assert rows


def test_padded_steps_draft_the_same(
    llm: LLM,
    reference: DenseReference,
    answers: dict[Tokens, Tokens],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step as a graph of 4 or 8 requests would do it, whatever the batch's size."""
    graphs = FakeGraphs(speculator(llm), monkeypatch)
    # On the Triton kernels: the references build small tensors from values they have read.
    with monkeypatch.context() as patches, poisoned(llm), watching(llm, answers) as watch:
        launches = use_triton(patches, _disable_current_modes)
        assert_parity(generate(llm), answers)
        # A good head needs few steps; each graph is to be replayed more than once.
        assert_parity(generate(llm, 3), answers)
    assert launches.keys() >= OUR_KERNELS
    print(f"replays (requests, padded) {dict(graphs.replays)}; ", end="")
    assert any(requests < padded for requests, padded in graphs.replays)
    assert graphs.overflowing_steps > 0, "no prompt brought more rows than the graph stores"
    assert len({requests for requests, _ in graphs.replays}) >= 3
    assert_all_equal(reference, watch, at_least=60)

    assert len(graphs.addresses) == 1, "a buffer has moved"
    named = {buffer.untyped_storage().data_ptr() for buffer in stable_buffers(graphs.ours)}
    # How often a size occurs depends on what the head gets accepted; two steps can be compared.
    assert any(len(steps) >= 2 for steps in graphs.storages.values())
    for steps in graphs.storages.values():
        first = steps[0].external
        for step in steps[1:]:
            moved = {a: step.external[a] for a in step.external.keys() - first.keys()}
            assert step.external.keys() == first.keys(), f"read elsewhere: {moved}"
        assert len(named & first.keys()) >= 6


def test_padded_steps_cache_no_foreign_logits(
    llm: LLM, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = FakeGraphs(speculator(llm), monkeypatch)
    sampled = SamplingParams(temperature=0.8, max_tokens=6, seed=1)
    outputs = llm.generate(TEXTS[:5], [greedy(8)] * 3 + [sampled] * 2, use_tqdm=False)
    assert_parity(continuations(outputs[:3]), answers)
    assert any(requests < padded for requests, padded in graphs.replays)
    assert len(graphs.addresses) == 1


def test_batches_that_shrink_grow_and_change_order(
    llm: LLM,
    reference: DenseReference,
    answers: dict[Tokens, Tokens],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests come while others are served, end early, or are aborted; one has a long prompt.

    A prompt's chunks are behind the requests that decode, whenever it came.
    """
    graphs = FakeGraphs(speculator(llm), monkeypatch)
    engine_ = llm.llm_engine
    llm.reset_prefix_cache()
    # Step: the requests that come before it, as (name, text, tokens wanted); None: aborted.
    plan: dict[int, dict[str, tuple[str, int] | None]] = {
        0: {"a": (TEXTS[0], 9), "b": (TEXTS[1], 3), "c": (TEXTS[2], 10)},
        1: {"long": (LONG[1], 9), "d": (TEXTS[3], 10)},
        3: {"a": None, "e": (TEXTS[4], 6)},
        5: {"d": None, "f": (TEXTS[5], 8), "g": (TEXTS[6], 8)},
    }
    found: dict[Tokens, Tokens] = {}
    step = 0
    with poisoned(llm), watching(llm, answers) as watch:
        while plan or engine_.has_unfinished_requests():
            for name, request in plan.pop(step, {}).items():
                if request is None:
                    engine_.abort_request([name])
                else:
                    engine_.add_request(name, request[0], greedy(request[1]))
            for output in engine_.step():
                if output.finished:
                    found |= continuations([output])
            step += 1
    assert_parity(found, answers)
    assert len(found) >= 5
    steps = list(pairwise(graphs.batches))
    assert any(set(after) < set(before) for before, after in steps), "no batch has shrunk"
    assert any(set(after) > set(before) for before, after in steps), "no batch has grown"
    assert any(
        [row for row in before if row in after] != [row for row in after if row in before]
        for before, after in steps
    ), "no batch has changed its order"
    assert len(graphs.addresses) == 1
    assert_all_equal(reference, watch, at_least=60)


def test_coupled_drafts_never_have_their_logits_allocated(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while the speculator is built: they can take gigabytes."""
    config = llm.llm_engine.vllm_config
    speculative = config.speculative_config

    def built() -> tuple[SpecFormerSpeculator, set[tuple[int, ...]]]:
        with set_current_vllm_config(config), Allocated() as allocated:
            return SpecFormerSpeculator(config, torch.device("cpu")), allocated.shapes

    ours, allocated = built()
    assert ours.draft_logits is not None
    logits = (ours.max_num_reqs, K, ours.vocab_size)
    assert tuple(ours.draft_logits.shape) == logits
    assert logits in allocated

    hf_config = speculative.draft_model_config.hf_config
    monkeypatch.setattr(hf_config, "specformer_verification", "coupled", raising=False)
    ours, allocated = built()
    assert ours.draws_with_target
    assert ours.draft_logits is None
    assert tuple(ours.draft_tokens.shape) in allocated
    assert not any(math.prod(shape) == math.prod(logits) for shape in allocated)
    # What was told the base class is nobody else's business.
    assert ours.speculative_config is ours.vllm_config.speculative_config is speculative
    assert speculative.draft_sample_method == "probabilistic"


def test_a_graph_draws_for_everybody(
    llm: LLM, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a batch with a sampled request that wants the best tokens is drafted without one."""
    graphs = FakeGraphs(speculator(llm), monkeypatch)
    best = SamplingParams(temperature=1, top_k=1, max_tokens=6)
    assert_parity(continuations(llm.generate(TEXTS[10:12], best, use_tqdm=False)), answers)
    assert not graphs.replays
    assert_parity(continuations(llm.generate(TEXTS[12:14], greedy(6), use_tqdm=False)), answers)
    assert graphs.replays


def test_capture_leaves_no_trace(
    llm: LLM, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own capture loop around our functions, less the recording: all rows are inert."""
    ours = speculator(llm)
    assert_parity(generate(llm, 4), answers)  # buffers of a real batch are what capture must undo
    captured = []

    def capture(self: Any, create_forward: Any, progress_bar_desc: str = "") -> None:
        for requests in (1, 2, ours.max_num_reqs):
            desc = BatchExecutionDescriptor(CUDAGraphMode.FULL, requests, requests, 1)
            create_forward(desc, False)(CUDAGraphMode.NONE)
            captured.append(requests)

    monkeypatch.setattr(CudaGraphManager, "capture", capture)
    (layer,) = ours.model.attn.layers
    layer.kv_cache.fill_(0.5)  # pages that an inert row must not touch
    before = layer.kv_cache.clone()
    assert ours.draft_logits is not None
    logits = ours.draft_logits.clone()
    ours.monitor.observe(4, torch.tensor([4]))
    resets: list[str] = []
    monkeypatch.setattr(ours.clock, "reset", lambda: resets.append("clock"))
    drafted: list[int] = []
    draft = ours._draft
    monkeypatch.setattr(ours, "_draft", lambda n, m, k: (drafted.append(k), draft(n, m, k)))
    monkeypatch.setattr(ours, "_scheduled_drafts", [0, 0, 2, K, 2, 0])
    ours.capture()
    assert drafted[:2] == [2, K], "not every number of drafts is compiled before serving"
    assert (ours.monitor._drafted, int(ours.monitor._rejected)) == (0, 0)
    assert resets == ["clock"]
    assert torch.equal(ours.draft_logits, logits)
    assert captured == [1, 2, ours.max_num_reqs]
    assert torch.equal(layer.kv_cache, before)
    llm.reset_prefix_cache()
    assert_parity(generate(llm, 4), answers)


def test_rotary_table_covers_what_is_served_and_no_more(llm: LLM) -> None:
    head = speculator(llm).model.head
    served = llm.llm_engine.model_config.max_model_len
    assert served < read_head_config(HEAD).max_position_embeddings
    assert len(head.rotary(torch.device("cpu"))) == served + head.config.num_draft_slots


def test_graphs_are_asked_for_when_vllm_wants_them(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one thing of the manager's construction that needs a GPU.
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    ours = speculator(llm)
    before = ours.query_cudagraph_manager
    try:
        for mode, expected in (
            (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY),
            (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY),
            (CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_DECODE_ONLY),
            (CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE),
            (CUDAGraphMode.NONE, CUDAGraphMode.NONE),
        ):
            ours.init_cudagraph_manager(mode)
            assert ours.query_cudagraph_manager.cudagraph_mode == expected
            assert ours.query_cudagraph_manager.decode_query_len == 1
    finally:
        ours.query_cudagraph_manager = before


def test_each_batch_has_its_graph(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own choice: the smallest captured batch that holds the requests, else eager.

    One graph per size, with as many drafts as a schedule has for it, so nothing is captured anew.
    """
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    ours = speculator(llm)
    largest = ours.max_num_reqs  # of the engine, 8
    sizes = [1, 2, 4, 6, 10, 20]  # rows: those past the largest batch fit a verification only
    compilation = ours.vllm_config.compilation_config
    monkeypatch.setattr(compilation, "cudagraph_capture_sizes", sizes)
    monkeypatch.setattr(compilation, "max_cudagraph_capture_size", sizes[-1])
    monkeypatch.setattr(ours, "query_cudagraph_manager", None)
    ours.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    manager = ours.query_cudagraph_manager
    assert manager is not None
    captured = [desc.num_reqs for desc in manager._capture_descs[CUDAGraphMode.FULL]]
    assert captured == [6, 4, 2, 1]
    manager._graphs_captured = True

    def chosen(requests: int, need_eager: bool = False) -> int | None:
        desc, _ = dispatch_cg_and_sync_dp(
            manager,
            requests,
            requests,
            uniform_token_count=1,
            dp_size=1,
            dp_rank=0,
            need_eager=need_eager,
        )
        return desc.num_reqs if desc.cg_mode == CUDAGraphMode.FULL else None

    found = [chosen(requests) for requests in range(1, largest + 1)]
    assert found == [1, 2, 4, 4, 6, 6, None, None]
    assert chosen(2, need_eager=True) is None
