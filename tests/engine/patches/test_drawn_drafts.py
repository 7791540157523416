"""V2's speculator is told of the requests that want the best tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams

from vllm_specformer.engine.draws.batch_v2 import BestRows
from vllm_specformer.engine.patches.drawn_drafts import add_requests

NEW = [
    SimpleNamespace(req_id="a", sampling_params=SamplingParams(temperature=1)),
    SimpleNamespace(req_id="b", sampling_params=SamplingParams(temperature=1, top_k=1)),
]


def added(speculator: Any) -> None:
    """State rows are known only after vLLM's own function."""
    runner = SimpleNamespace(speculator=speculator, req_states=SimpleNamespace(req_id_to_index={}))

    def original(self: Any, output: Any) -> None:
        rows = {request.req_id: 5 - row for row, request in enumerate(output.scheduled_new_reqs)}
        self.req_states.req_id_to_index.update(rows)

    add_requests(original, runner, SimpleNamespace(scheduled_new_reqs=NEW))
    assert runner.req_states.req_id_to_index == {"a": 5, "b": 4}


def test_by_state_row() -> None:
    best = BestRows(8, torch.device("cpu"))
    added(SimpleNamespace(best_rows=best))
    found = best.of(np.arange(8), torch.arange(8))
    assert found is not None
    assert found.nonzero().tolist() == [[4]]


def test_other_speculators_are_left_alone() -> None:
    for speculator in (None, SimpleNamespace()):
        added(speculator)
