"""What an engine is asked for by a plan: the time of its steps, and what is accepted.

These functions run in the engine's process (see serving/engine_process.py).
"""

from __future__ import annotations

import time
from typing import Any

from vllm_specformer.serving.counts import own_draft_counts
from vllm_specformer.serving.engine import Engine

_SETTLING_STEPS = 2  # the first still verifies drafts of the count before
_MIN_STEPS = 2


def times(
    engine: Engine, prompts: list[list[int]], counts: list[int], steps: int, seconds: float
) -> dict[str, Any]:
    """Decoding steps of all prompts at once, at each number of drafted tokens in turn.

    Args:
        prompts: token ids, one list per request.
        steps, seconds: timed steps at each count, fewer (but two) once they took so long.

    Returns:
        By count: the steps' seconds, and the mean of the draft steps within; and the seconds that
        reading one of the prompts took.
    """
    room = (max(counts) + 1) * (steps + _SETTLING_STEPS) * len(counts) + 1
    names = engine.submit_endless(prompts, room)
    engine.hold_drafts(0)
    began = time.perf_counter()
    engine.read_prompts(names)
    reading = (time.perf_counter() - began) / len(names)
    found: dict[str, Any] = {"steps": {}, "drafts": {}, "prompt": reading}
    for count in counts:
        engine.hold_drafts(count)
        for _ in range(_SETTLING_STEPS):
            engine.step()
        before = own_draft_counts()
        timed: list[float] = []
        while len(timed) < steps and (len(timed) < _MIN_STEPS or sum(timed) < seconds):
            began = time.perf_counter()
            engine.step()
            timed.append(time.perf_counter() - began)
        drafted = own_draft_counts() - before
        found["steps"][count] = timed
        found["drafts"][count] = (drafted.draft_seconds or 0.0) / max(1, drafted.draft_steps or 0)
    engine.abort(names)
    engine.finish()
    return found


def accepted(
    engine: Engine, prompts: list[list[int]], count: int, max_tokens: int
) -> dict[str, Any]:
    """Answer all prompts to their end; tokens per step, and the answers themselves."""
    engine.hold_drafts(count)
    before = own_draft_counts()
    answers: dict[str, list[int]] = {engine.submit(ids, max_tokens): [] for ids in prompts}
    while engine.is_busy:
        for output in engine.step():
            answers[output.request_id] += output.outputs[0].token_ids
    decoded = sum(map(len, answers.values())) - len(answers)
    drafts_accepted = (own_draft_counts() - before).accepted
    return {
        "tokens_per_step": decoded / max(1, decoded - drafts_accepted),
        "answers": list(answers.values()),
    }
