"""One vLLM engine in one process, told over a pipe what to generate.

vLLM keeps global state, so each arm of `serving_cpu.py` gets a process of its own. It loads its
engine, then blocks on reading standard input, which costs nothing while another arm is measured.
Requests and answers are one line of JSON each. The engine runs inside this process, so that the
draft step can be timed from within.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

PREFIX = "vllm:spec_decode_num_"


class DraftTimer:
    """Adds up the time spent inside a proposer's `propose`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, proposer: type) -> None:
        propose: Callable[..., Any] = proposer.propose  # type: ignore[attr-defined]

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return propose(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        proposer.propose = timed  # type: ignore[attr-defined]


class Worker:
    def __init__(self, engine_options: dict[str, Any]) -> None:
        from vllm import LLM

        self.engine = LLM(**engine_options).llm_engine
        self.timer = DraftTimer()
        self.served = 0
        method = (engine_options.get("speculative_config") or {}).get("method")
        if method == "specformer":
            from vllm_specformer.engine.proposer_v1 import SpecFormerProposer

            self.timer.wrap(SpecFormerProposer)
        elif method == "ngram":
            from vllm.v1.spec_decode.ngram_proposer import NgramProposer

            self.timer.wrap(NgramProposer)

    def run(
        self, prompts: list[str], concurrency: int, temperature: float, max_tokens: int
    ) -> dict[str, Any]:
        """Complete all prompts, `concurrency` at a time, and say what it took."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        waiting = list(enumerate(prompts))[::-1]
        tokens: dict[str, list[int]] = {}
        prompt_of: dict[str, int] = {}
        running = steps = request_steps = 0
        drafted_before, draft_before = self._draft_counts(), self.timer.seconds
        cpu_before, started = time.process_time(), time.perf_counter()
        while waiting or running:
            while waiting and running < concurrency:
                index, prompt = waiting.pop()
                self.served += 1
                params = SamplingParams(
                    temperature=temperature,
                    max_tokens=max_tokens,
                    seed=index if temperature else None,
                    output_kind=RequestOutputKind.DELTA,
                )
                name = f"r{self.served}"
                self.engine.add_request(name, prompt, params)
                tokens[name], prompt_of[name] = [], index
                running += 1
            outputs = self.engine.step()
            steps += 1
            for output in outputs:
                tokens[output.request_id] += output.outputs[0].token_ids
                request_steps += 1
                running -= output.finished
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_before
        generated = sum(map(len, tokens.values()))
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "draft_seconds": self.timer.seconds - draft_before,
            "steps": steps,
            "tokens": generated,
            # A prompt's own step yields one token and has no draft behind it.
            "decode_tokens": generated - len(prompts),
            "decode_request_steps": request_steps - len(prompts),
            "outputs": [ids for _, ids in sorted((prompt_of[k], ids) for k, ids in tokens.items())],
            **_difference(self._draft_counts(), drafted_before),
        }

    def _draft_counts(self) -> dict[str, Any]:
        """The engine's own counters of drafts, as /metrics shows them."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        found: dict[str, Any] = {}
        for metric in get_metrics_snapshot():
            if metric.name.startswith(PREFIX):
                name = metric.name.removeprefix(PREFIX)
                found[name] = metric.values if hasattr(metric, "values") else metric.value
        return found


def _difference(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [a - b for a, b in zip(value, before[name], strict=True)]
        if isinstance(value, list)
        else value - before[name]
        for name, value in now.items()
    }


def answer_on_private_stdout() -> TextIO:
    """A handle on standard output for answers only: what vLLM prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> None:
    answers = answer_on_private_stdout()
    worker = Worker(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
