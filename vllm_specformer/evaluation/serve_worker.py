"""One vLLM engine with a head in a process of its own; the steps of every request, one by one.

    python -m vllm_specformer.evaluation.serve_worker ORDER.json RESULT.json

It ends when its standard input closes, so it does not outlive who started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import DiskFullError, write_atomic

DISK_FULL = 28  # the exit code where the answers could not be written
_COUNTERS = (
    "num_preemptions",
    "prefix_cache_hits",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
)
_SECONDS_BETWEEN_LINES = 20.0


def main() -> None:
    order_file, result_file = map(Path, sys.argv[1:])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    order = json.loads(order_file.read_bytes())
    try:
        import vllm

        llm = vllm.LLM(**order["engine"])
    except (ImportError, TypeError, ValueError) as error:
        _write(result_file, {"error": str(error)})
        return
    config = llm.llm_engine.vllm_config
    result = {
        "vllm": vllm.__version__,
        "runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        "jobs": [
            _run(llm, job, order["extra_tokens"], set(order["end_ids"])) for job in order["jobs"]
        ],
    }
    _write(result_file, result)


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        write_atomic(path, json.dumps(result).encode())
    except DiskFullError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(DISK_FULL)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _run(llm: Any, job: dict[str, Any], extra: int, end_ids: set[int]) -> dict[str, Any]:
    """All requests of a job at once: each one's tokens, step by step, and what vLLM counted.

    vLLM cuts a step's tokens off where the answer ends, which hides what was accepted. So a request
    may go `extra` tokens past the end, and is ended here once its last step is there.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, before = llm.llm_engine, _counters(llm)
    steps: dict[str, list[list[int]]] = {}
    limits = {}
    for name, request in job["requests"].items():
        params = SamplingParams(
            temperature=request["temperature"],
            max_tokens=request["max_tokens"] + extra,
            seed=request["seed"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(name, {"prompt_token_ids": request["prompt_ids"]}, params)
        steps[name], limits[name] = [], request["max_tokens"]
    said = time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens, name = list(output.outputs[0].token_ids), output.request_id
            if not tokens or name not in limits:
                continue
            steps[name].append(tokens)
            limits[name] -= len(tokens)
            if limits[name] <= 0 or not end_ids.isdisjoint(tokens):
                del limits[name]
                engine.abort_request([name])
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"engine: {len(limits)} answers to go", file=sys.stderr, flush=True)
    return {"steps": steps, "counters": _increase(before, _counters(llm))}


def _counters(llm: Any) -> dict[str, Any]:
    found = {}
    for metric in llm.get_metrics():
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


if __name__ == "__main__":
    main()
