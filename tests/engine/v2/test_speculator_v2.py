"""How the V2 speculator takes a step: as a graph, with rows stored before it, or eagerly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from support.v2.engines import K
from vllm_specformer.engine import speculator_v2
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator


def scheduled(sizes: list[int], drafts: list[int]) -> SpecFormerSpeculator:
    """A speculator with graphs of these sizes, asked for `drafts` by number of requests."""
    ours = object.__new__(SpecFormerSpeculator)
    ours.num_speculative_steps, ours.max_num_tokens = K, 384
    ours.dp_size, ours.dp_rank = 1, 0
    ours._scheduled_drafts, ours._graph_drafts = [0, *drafts], {}
    compilation = SimpleNamespace(cudagraph_capture_sizes=sizes)
    ours.vllm_config = SimpleNamespace(compilation_config=compilation)
    return ours


def test_a_graph_drafts_what_its_batches_are_asked_for() -> None:
    """Sizes 1, 2, 4, 8; the last draft fewer tokens, and store fewer rows."""
    ours = scheduled([8, 1, 4, 2], [4, 4, 3, 2, 2, 1, 0, 0])
    assert [ours._num_graph_drafts(size) for size in (1, 2, 4, 8)] == [4, 4, 3, 2]
    assert [ours._num_graph_context_tokens(size) for size in (1, 2, 4, 8)] == [5, 10, 16, 24]
    never = scheduled([4, 8], [2, 2, 2, 2, 0, 0, 0, 0])
    assert [never._num_graph_drafts(size) for size in (4, 8)] == [2, 1]


@pytest.mark.parametrize(
    ("mode", "tokens", "wanted", "expected"),
    [
        (CUDAGraphMode.FULL, 15, K, ["graph 4"]),
        (CUDAGraphMode.FULL, 20, K, ["graph 4"]),
        (CUDAGraphMode.FULL, 15, 1, ["graph 4"]),
        (CUDAGraphMode.FULL, 33, K, ["store 20:33", "graph 4"]),
        (CUDAGraphMode.FULL, 15, K + 1, [f"draft 3 x {K + 1}, store 0:15"]),
        (CUDAGraphMode.NONE, 15, K, [f"draft 3 x {K}, store 0:15"]),
        (CUDAGraphMode.NONE, 33, 2, ["draft 3 x 2, store 0:33"]),
        (CUDAGraphMode.PIECEWISE, 15, K, [f"draft 3 x {K}, store 0:15"]),
    ],
)
def test_choice_of_graph(
    mode: CUDAGraphMode,
    tokens: int,
    wanted: int,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three requests, graphs of four that draft K tokens and store 4 * (K + 1) context rows."""
    ours = scheduled([], [K] * 8)
    done: list[str] = []
    desc = BatchExecutionDescriptor(mode, 4, 4)
    eager: list[bool] = []

    def dispatch(manager: Any, requests: int, rows: int, **kwargs: Any) -> Any:
        assert (requests, rows) == (3, 3)
        eager.append(kwargs["need_eager"])
        return desc, None

    monkeypatch.setattr(speculator_v2, "dispatch_cg_and_sync_dp", dispatch)
    ours.query_cudagraph_manager = SimpleNamespace(
        run_fullgraph=lambda d: done.append(f"graph {d.num_reqs}")
    )
    monkeypatch.setattr(
        SpecFormerSpeculator,
        "_store_context_and_query",
        lambda _, a, b: done.append(f"store {a}:{b}"),
    )
    monkeypatch.setattr(
        SpecFormerSpeculator,
        "_draft",
        lambda _, n, m, k: done.append(f"draft {n} x {k}, store 0:{m}"),
    )
    ours._run(3, tokens, wanted, None, need_eager=mode == CUDAGraphMode.NONE)
    assert done == expected
    assert eager == [mode == CUDAGraphMode.NONE]
