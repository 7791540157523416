"""What the served comparison asks of an engine; it runs in the engine's process."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from vllm_specformer.serving.engine import Engine

_COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def answer(
    engine: Engine, prompts: list[list[int]], at_once: int, max_tokens: int
) -> dict[str, Any]:
    """Answer greedily, so many at a time.

    Returns:
        Tokens, seconds on the wall and of the processor, what speculation counted, and a digest of
        the texts, which are the same with every head.
    """
    before = _counted(engine)
    waiting, running = list(reversed(prompts)), 0
    texts: dict[str, list[int]] = {}
    wall, processor = time.perf_counter(), time.process_time()
    while waiting or running:
        while waiting and running < at_once:
            texts[engine.submit(waiting.pop(), max_tokens)] = []
            running += 1
        for output in engine.step():
            texts[output.request_id] += output.outputs[0].token_ids
            running -= output.finished
    seconds = time.perf_counter() - wall
    cpu_seconds = time.process_time() - processor
    counted = _counted(engine)
    return {
        "tokens": sum(map(len, texts.values())),
        "seconds": round(seconds, 4),
        "cpu_seconds": round(cpu_seconds, 4),
        "texts": hashlib.sha256(json.dumps(list(texts.values())).encode()).hexdigest()[:16],
    } | {name: counted[name] - before.get(name, 0) for name in counted}


def _counted(engine: Engine) -> dict[str, float]:
    values = {metric.name: metric for metric in engine.llm.get_metrics()}
    names = {name: f"vllm:spec_decode_{name}" for name in _COUNTERS}
    return {name: values[full].value for name, full in names.items() if full in values}
