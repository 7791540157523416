"""Tells V2's speculator of new requests, whose parameters its runner does not keep.

A grammar cuts a request's drafts off from the first that it forbids, and the token there is drawn
from the target's distribution. That is right for a draft that was chosen. One that was drawn had a
share of the distribution to itself, and the text lacks the target's distribution if what is left is
not made up for: vLLM 0.32 and 0.33 do not. So these requests get the head's best tokens (see
`draws/rules.py`).

Where trees are drafted, a state row's tree dies with its tenant: the scheduler may give a new
request rows of placeholders at once. And some requests need chains (see `candidates/chains.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import patch


@patch(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
    why="tells the speculator of new requests: sampled ones with a grammar must not have drawn "
    "drafts, which would lose the target's distribution, and no tree outlives its request",
    guard="acts only where SpecFormer's speculator drafts",
)
def add_requests(original: Callable[..., None], self: Any, scheduler_output: Any) -> None:
    original(self, scheduler_output)
    admit = getattr(self.speculator, "admit_request", None)
    if admit is not None:
        rows = self.req_states.req_id_to_index
        for request in scheduler_output.scheduled_new_reqs:
            admit(rows[request.req_id], request.sampling_params, self.sampler)
