"""vLLM's GPU worker: the end of its warm-up, and weights that are replaced while it serves.

vLLM tells a drafter to capture its graphs, and tells it nothing where there are none. And it lets a
drafter's weights be replaced, which a head's, cut for serving, cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import patch
from vllm_specformer.engine.speculative_config import drafts_with_head


def _drafts(worker: Any) -> bool:
    return drafts_with_head(getattr(worker.vllm_config, "speculative_config", None))


@patch(
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
    why="with --enforce-eager vLLM tells no drafter that it warms up, and requests would wait for "
    "the head's kernels to be compiled: compiles them before vLLM's warm-up, and has the head "
    "forget after it what was drafted",
    guard="acts only where a SpecFormer head drafts on the V2 runner",
)
def compile_or_warm_up_model(original: Callable[..., Any], self: Any) -> Any:
    speculator = getattr(self.model_runner, "speculator", None) if _drafts(self) else None
    if speculator is None:
        return original(self)
    speculator.warm_up()
    times = original(self)
    speculator.end_warm_up()
    return times


@patch(
    "vllm.v1.worker.gpu_worker:Worker.start_draft_weight_update",
    why="vLLM takes a drafter's weights away before it asks the drafter to load others, and a "
    "head's are cut for serving: refuses the update while nothing is lost",
    guard="acts only where a SpecFormer head drafts",
)
def start_draft_weight_update(original: Callable[..., Any], self: Any) -> Any:
    if _drafts(self):
        from vllm_specformer.engine.model import refuse_other_weights

        refuse_other_weights()
    return original(self)
