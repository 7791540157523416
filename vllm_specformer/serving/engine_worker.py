"""The process of an `EngineProcess`: it takes orders and gives answers, a line of JSON each.

    python -m vllm_specformer.serving.engine_worker

The first line holds the engine's arguments, each further one a function, as "module:name", with its
keyword arguments; the engine is passed first. The engine runs inside this process, so a step is
what the engine itself takes. The process ends when its standard input closes, at work too: it does
not outlive who started it. On a line `END_NOW` it ends at once, without vLLM's own farewell.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import threading
from queue import Queue
from typing import Any, NoReturn, TextIO

from vllm_specformer.serving.engine import Engine

END_NOW = "end now"


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = _answers_on_stdout()
    orders: Queue[str] = Queue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    if not (first := orders.get()):
        return
    try:
        engine = Engine(json.loads(first))
    except (ImportError, TypeError, ValueError) as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    answer: dict[str, Any] = {"ready": True}
    while True:
        orders.task_done()
        print(json.dumps(answer), file=answers, flush=True)
        if not (line := orders.get()):
            break
        order = json.loads(line)
        module, _, name = order["function"].partition(":")
        answer = getattr(importlib.import_module(module), name)(engine, **order["arguments"])
    engine.llm.llm_engine.engine_core.shutdown()


def _read(orders: Queue[str]) -> None:
    for line in sys.stdin:
        if line.strip() == END_NOW:
            _end_now()
        orders.put(line)
    if orders.unfinished_tasks:
        _end_now()
    orders.put("")


def _end_now() -> NoReturn:
    """End with vLLM's workers, which go on for many seconds if nobody ends them."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(1)


def _answers_on_stdout() -> TextIO:
    """A handle on standard output for answers only: what vLLM prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
