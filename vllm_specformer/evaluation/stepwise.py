"""Answers of an engine in the steps they came in, and what vLLM counted meanwhile.

`answer` runs in the engine's process (see serving/engine_process.py).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from vllm_specformer.serving.engine import Engine

_COUNTERS = (
    "num_preemptions",
    "prefix_cache_hits",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
)
_SECONDS_BETWEEN_LINES = 20.0


def answer(
    engine: Engine, requests: dict[str, dict[str, Any]], extra_tokens: int, end_ids: list[int]
) -> dict[str, Any]:
    """All requests at once: each one's tokens, step by step, and what vLLM counted.

    vLLM cuts a step's tokens off where the answer ends, which hides what was accepted. So a request
    may go `extra_tokens` past the end, and is ended here once its last step is there.

    Args:
        requests: number -> fields of a `Request`.
    """
    import vllm

    before = _counters(engine)
    steps: dict[str, list[list[int]]] = {number: [] for number in requests}
    left, numbers = {}, {}
    for number, request in requests.items():
        name = engine.submit(
            request["prompt_ids"],
            request["max_tokens"] + extra_tokens,
            temperature=request["temperature"],
            seed=request["seed"],
            ignore_eos=True,
        )
        numbers[name], left[name] = number, request["max_tokens"]
    said = time.monotonic()
    while engine.is_busy:
        for output in engine.step():
            tokens, name = list(output.outputs[0].token_ids), output.request_id
            if not tokens or name not in left:
                continue
            steps[numbers[name]].append(tokens)
            left[name] -= len(tokens)
            if left[name] <= 0 or not set(end_ids).isdisjoint(tokens):
                del left[name]
                engine.abort([name])
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"engine: {len(left)} answers to go", file=sys.stderr, flush=True)
    counters = _increase(before, _counters(engine))
    about = {"vllm": vllm.__version__, "runner": engine.runner}
    return {"steps": steps, "counters": counters, **about}


def _counters(engine: Engine) -> dict[str, Any]:
    found = {}
    for metric in engine.llm.get_metrics():
        name = metric.name.removeprefix("vllm:")
        if name in _COUNTERS:
            found[name] = metric.values if hasattr(metric, "values") else metric.value
    return found


def _increase(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [b - a for a, b in zip(before[name], value, strict=True)]
        if isinstance(value, list)
        else value - before[name]
        for name, value in after.items()
    }
