"""Drafts travel to the scheduler with the step's output, not in a call of their own (CPU, V1).

Without asynchronous scheduling vLLM's engine asks the worker for the drafts after every step, also
after those that drafted nothing. On a CPU the worker is a process of its own, both sides wait by
spinning, and the HTTP front wants the same cores just then to send the step's tokens: the answer
to that call takes as long as it takes the worker to get its core back, and the next step waits.
The drafts lie on the CPU when the step's output leaves the worker, so they go along with it.

A GPU's drafts are still being computed at that moment; nothing is changed there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import patch
from vllm_specformer.engine.speculative_config import drafts_with_head

_DRAFTS = "specformer_drafts"
_ASK = object()  # no drafts came along: ask for them, as vLLM does


@patch(
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens",
    why="puts a step's drafts on its output, which spares the engine a call to the worker per step",
    guard="the CPU's runner alone, and only when the draft architecture is SpecFormerDraftModel",
)
def send_with_output(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    stepped = self.execute_model_state is not None
    output = original(self, *args, **kwargs)
    # Without a step of the model the output is one that all steps share.
    if stepped and drafts_with_head(self.speculative_config):
        setattr(output, _DRAFTS, self.take_draft_token_ids())
    return output


@patch(
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.sample_tokens",
    why="takes a step's drafts off its output, where the worker has put them",
    guard="acts on outputs that carry drafts",
)
def receive_with_output(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    vars(self)[_DRAFTS] = vars(output).pop(_DRAFTS, _ASK) if hasattr(output, _DRAFTS) else _ASK
    return output


@patch(
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids",
    why="gives the engine the drafts that came with the output, without a call to the worker",
    guard="asks as before where no drafts came along",
)
def take_received(original: Callable[..., Any], self: Any) -> Any:
    carried = vars(self).pop(_DRAFTS, _ASK)
    return original(self) if carried is _ASK else carried
