"""A step that verifies no drafts is sampled as one without speculation (CPU, V1).

With any speculation vLLM 0.32 and 0.33 lay every step out for verification, and sample it with the
rejection sampler: also those that a schedule gives no drafts. The rejection sampler picks the rows
of the bonus tokens, which are all rows then, hands them to the ordinary sampler and puts nothing in
front of what comes back. At 64 requests that takes a CPU half a millisecond, and the ordinary
sampler alone gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import patch
from vllm_specformer.engine.speculative_config import drafts_with_head


@patch(
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.execute_model",
    why="a step without drafts was laid out and sampled for verification, which its tokens do not "
    "need",
    guard="the CPU's runner alone, without asynchronous scheduling, and only when the draft "
    "architecture is SpecFormerDraftModel and no request of the step has drafts",
)
def execute_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    state = self.execute_model_state
    if state is None or self.use_async_scheduling:
        return output
    layout = state.spec_decode_metadata
    if layout is None or any(layout.num_draft_tokens):
        return output
    if drafts_with_head(self.speculative_config):
        self.execute_model_state = state._replace(spec_decode_metadata=None)
    return output
