"""Drafts travel to the scheduler with the step's output, not in a call of their own (CPU, V1).

Without asynchronous scheduling vLLM's engine asks the worker for the drafts after every step, also
after those that drafted nothing. On a CPU the worker is a process of its own, both sides wait by
spinning, and the HTTP front wants the same cores just then to send the step's tokens: the answer
to that call takes as long as it takes the worker to get its core back, and the next step waits.
The drafts lie on the CPU when the step's output leaves the worker, so they go along with it.

A GPU's drafts are still being computed at that moment; nothing is changed there.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_specformer.engine.speculative_config import drafts_with_head

_DRAFTS = "specformer_drafts"


def send_with_output(module: ModuleType) -> None:
    """Let `CPUModelRunner` of `vllm.v1.worker.cpu_model_runner` put drafts on a step's output."""
    runner = getattr(module, "CPUModelRunner", None)
    if runner is None or "sample_tokens" in vars(runner):
        return
    original = runner.sample_tokens

    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        stepped = self.execute_model_state is not None
        output = original(self, *args, **kwargs)
        # Without a step of the model the output is one that all steps share.
        if stepped and drafts_with_head(self.speculative_config):
            setattr(output, _DRAFTS, self.take_draft_token_ids())
        return output

    runner.sample_tokens = sample_tokens


def receive_with_output(module: ModuleType) -> None:
    """Let `MultiprocExecutor` of `vllm.v1.executor.multiproc_executor` take them from there."""
    executor = getattr(module, "MultiprocExecutor", None)
    if executor is None or hasattr(executor.sample_tokens, "__wrapped__"):
        return
    sample, take = executor.sample_tokens, executor.take_draft_token_ids

    @functools.wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample(self, *args, **kwargs)
        vars(self)[_DRAFTS] = vars(output).pop(_DRAFTS, _ASK) if hasattr(output, _DRAFTS) else _ASK
        return output

    @functools.wraps(take)
    def take_draft_token_ids(self: Any) -> Any:
        carried = vars(self).pop(_DRAFTS, _ASK)
        return take(self) if carried is _ASK else carried

    executor.sample_tokens = sample_tokens
    executor.take_draft_token_ids = take_draft_token_ids


_ASK = object()  # no drafts came along: ask for them, as vLLM does
