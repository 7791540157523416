"""The same questions through the real engine: what it answered, and in which steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specformer.distill.backend import EngineError
from vllm_specformer.distill.dialogue import Request
from vllm_specformer.evaluation.answers import cut
from vllm_specformer.serving.engine_process import EngineProcess, EngineProcessError
from vllm_specformer.training.texts import Text

_ANSWER = "vllm_specformer.evaluation.stepwise:answer"
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
            raise EngineError(f"--engine-args: {name!r} is set by the evaluation", "leave it out")
    speculative = {
        "method": "specformer",
        "model": str(head),
        "num_speculative_tokens": num_tokens,
        # Text alone decides what is accepted of these: the replay knows every step.
        "draft_sample_method": "greedy",
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
    order = {"extra_tokens": num_tokens + 1, "end_ids": sorted(end_ids)}
    try:
        with EngineProcess(engine) as process:
            return [
                _served(
                    job,
                    process.call(_ANSWER, requests=_fields(job), **order),
                    num_tokens,
                    end_ids,
                )
                for job in jobs
            ]
    except EngineProcessError as error:
        raise EngineError(
            f"--engine: {error}", "--engine-args sets the engine's memory and the like"
        ) from None


def _fields(job: Mapping[int, Request]) -> dict[int, dict[str, Any]]:
    return {number: asdict(request) for number, request in job.items()}


def _served(
    job: Mapping[int, Request],
    found: dict[str, Any],
    num_tokens: int,
    end_ids: frozenset[int],
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
    about = {"vllm": found["vllm"], "runner": found["runner"]}
    return Served(num_tokens, temperature, texts, steps, found["counters"], **about)
