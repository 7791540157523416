"""The same questions through the real engine: what it answered, and in which steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specformer.data.files import DiskFullError
from vllm_specformer.distill.backend import EngineError
from vllm_specformer.distill.dialogue import Request
from vllm_specformer.evaluation.answers import cut
from vllm_specformer.evaluation.serve_worker import DISK_FULL
from vllm_specformer.training.texts import Text

WORKER = "vllm_specformer.evaluation.serve_worker"
# Arguments of vLLM that an option of ours, or the evaluation itself, sets.
_OWN = (
    *("model", "tokenizer", "revision", "dtype", "max_model_len"),
    *("speculative_config", "disable_log_stats"),
)
# So many requests with their drafts stay below vLLM's smallest token budget per step, which would
# otherwise cut drafts off.
_REQUESTS_AT_ONCE = 64


@dataclass(frozen=True)
class Served:
    """Answers of one engine at one temperature.

    Attributes:
        texts: prompt and answer of every request.
        steps: request -> tokens emitted in each step that verified drafts: those accepted and a
            bonus token, in the last step possibly past the answer's end. The first token of an
            answer comes from the prompt's own step, before there was a draft, and is not among
            them.
        counters: increase of vLLM's own counters, as /metrics shows them.
    """

    num_tokens: int
    temperature: float
    texts: list[Text]
    steps: dict[int, list[int]]
    counters: dict[str, Any]
    vllm: str
    runner: str


def serve(
    head: Path,
    target: Path,
    num_tokens: int,
    jobs: Sequence[Mapping[int, Request]],
    *,
    dtype: str,
    end_ids: frozenset[int],
    max_model_len: int,
    engine_args: dict[str, Any],
) -> list[Served]:
    """Let an engine that drafts `num_tokens` per step answer every job, one after another.

    The engine runs in a child process, which gives the device's memory back when it ends.
    `max_model_len` must leave room for `num_tokens + 1` tokens past every answer.

    Raises:
        EngineError: it does not start, or ends before it has answered.
    """
    for name in engine_args:
        if name in _OWN:
            raise EngineError(f"--engine-args: {name!r} is set by the evaluation; leave it out")
    speculative = {
        "method": "specformer",
        "model": str(head),
        "num_speculative_tokens": num_tokens,
        "draft_sample_method": "greedy",  # vLLM's default, which the replay relies on
    }
    engine = {
        "max_num_seqs": _REQUESTS_AT_ONCE,
        **engine_args,
        "model": str(target),
        "max_model_len": max_model_len,
        "dtype": dtype,
        "speculative_config": speculative,
        "disable_log_stats": False,
    }
    requests = [{number: asdict(request) for number, request in job.items()} for job in jobs]
    order = {
        "engine": engine,
        "end_ids": sorted(end_ids),
        "extra_tokens": num_tokens + 1,
        "jobs": [{"requests": job} for job in requests],
    }
    result = _run_worker(order)
    return [
        _served(job, found, num_tokens, end_ids, result)
        for job, found in zip(jobs, result["jobs"], strict=True)
    ]


def _served(
    job: Mapping[int, Request],
    found: dict[str, Any],
    num_tokens: int,
    end_ids: frozenset[int],
    result: dict[str, Any],
) -> Served:
    texts, steps = [], {}
    for name, emitted in found["steps"].items():
        number = int(name)
        request = job[number]
        answer = cut([token for step in emitted for token in step], request.max_tokens, end_ids)
        start = len(request.prompt_ids)
        ids = np.array([*request.prompt_ids, *answer], dtype=np.int32)
        texts.append(Text(number, ids, ((start, len(ids)),), request.temperature))
        steps[number] = [len(step) for step in emitted[1:]]
    temperature = next(iter(job.values())).temperature
    about = {"vllm": result["vllm"], "runner": result["runner"]}
    return Served(num_tokens, temperature, texts, steps, found["counters"], **about)


def _run_worker(order: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="specformer-eval-") as folder:
        order_file, result_file = Path(folder, "order.json"), Path(folder, "result.json")
        order_file.write_text(json.dumps(order))
        command = [sys.executable, "-m", WORKER, str(order_file), str(result_file)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, env=os.environ)
        try:
            code = worker.wait()
        finally:
            worker.kill()
            worker.wait()
        if code == DISK_FULL:
            raise DiskFullError(
                f"--engine: its answers could not be written to {folder}, for the reason above; "
                "TMPDIR chooses another directory"
            )
        if not result_file.is_file():
            raise EngineError(
                f"--serve: vLLM ended with code {code} before it had answered; its messages stand "
                "above, VLLM_LOGGING_LEVEL=INFO shows more, --engine-args sets memory and the like"
            )
        result: dict[str, Any] = json.loads(result_file.read_bytes())
    if "error" in result:
        raise EngineError(f"--serve: vLLM does not start: {result['error']}")
    return result
