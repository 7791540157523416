"""V2's speculator is told of new requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams

from vllm_specformer.engine.patches.new_requests import add_requests

NEW = [
    SimpleNamespace(req_id="a", sampling_params=SamplingParams(temperature=1)),
    SimpleNamespace(req_id="b", sampling_params=SamplingParams(temperature=1, top_k=1)),
]
SAMPLER = object()


def added(speculator: Any) -> None:
    """State rows are known only after vLLM's own function."""
    runner = SimpleNamespace(
        speculator=speculator,
        sampler=SAMPLER,
        req_states=SimpleNamespace(req_id_to_index={}),
    )

    def original(self: Any, output: Any) -> None:
        rows = {request.req_id: 5 - row for row, request in enumerate(output.scheduled_new_reqs)}
        self.req_states.req_id_to_index.update(rows)

    add_requests(original, runner, SimpleNamespace(scheduled_new_reqs=NEW))
    assert runner.req_states.req_id_to_index == {"a": 5, "b": 4}


def test_by_state_row() -> None:
    told: list[tuple[Any, ...]] = []
    added(SimpleNamespace(admit_request=lambda *request: told.append(request)))
    assert told == [(5, NEW[0].sampling_params, SAMPLER), (4, NEW[1].sampling_params, SAMPLER)]


def test_other_speculators_are_left_alone() -> None:
    for speculator in (None, SimpleNamespace()):
        added(speculator)
