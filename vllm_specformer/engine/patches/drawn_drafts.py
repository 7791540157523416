"""Drawn drafts and grammars: tells V2's speculator which requests must not have them.

A grammar cuts a request's drafts off from the first that it forbids, and the token there is drawn
from the target's distribution. That is right for a draft that was chosen. One that was drawn had a
share of the distribution to itself, and the text lacks the target's distribution if what is left is
not made up for: vLLM 0.32 and 0.33 do not. So these requests get the head's best tokens (see
`draws/rules.py`). V1's runner knows a request's parameters when it drafts, V2's keeps none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import patch


@patch(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
    why="tells the speculator which requests want the head's best tokens although they are "
    "sampled: those with a grammar lose the target's distribution otherwise (V2 runner)",
    guard="acts only where SpecFormer's speculator drafts",
)
def add_requests(original: Callable[..., None], self: Any, scheduler_output: Any) -> None:
    original(self, scheduler_output)
    best = getattr(self.speculator, "best_rows", None)
    if best is not None:
        rows = self.req_states.req_id_to_index
        for request in scheduler_output.scheduled_new_reqs:
            best.add_request(rows[request.req_id], request.sampling_params)
