"""An engine in a process of its own that times its steps; told what over a pipe.

    python -m vllm_specformer.planning.worker '{"engine": {...}, "drafts": true}'

Requests and answers are one line of JSON each. The engine runs inside this process: a step is what
the engine itself takes, without the server around it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from vllm_specformer.serving.counts import DRAFT_SECONDS, DRAFT_STEPS

_SETTLING_STEPS = 2  # the first still verifies drafts of the count before
_MIN_STEPS = 2


class Worker:
    """An engine; `drafts` says whether it has a SpecFormer head."""

    def __init__(self, engine: dict[str, Any], drafts: bool) -> None:
        import vllm

        self.llm = vllm.LLM(**engine)
        self.engine = self.llm.llm_engine
        self.drafts = drafts
        self.served = 0

    def times(
        self, prompts: list[list[int]], counts: list[int], steps: int, seconds: float
    ) -> dict[str, Any]:
        """Decoding steps of all prompts at once, at each number of drafted tokens in turn.

        Args:
            prompts: token ids, one list per request.
            steps, seconds: timed steps at each count, fewer (but two) once they took so long.

        Returns:
            By count: the steps' seconds, and the mean of the draft steps within; and the seconds
            that reading one of the prompts took.
        """
        room = (max(counts) + 1) * (steps + _SETTLING_STEPS) * len(counts) + 1
        names = self._submit(prompts, room, ignore_eos=True)
        self._hold(0)
        started: set[str] = set()
        began = time.perf_counter()
        while len(started) < len(names):
            started |= {out.request_id for out in self.engine.step() if out.outputs[0].token_ids}
        reading = (time.perf_counter() - began) / len(names)
        found: dict[str, Any] = {"steps": {}, "drafts": {}, "prompt": reading}
        for count in counts:
            self._hold(count)
            for _ in range(_SETTLING_STEPS):
                self.engine.step()
            clock = self._clock()
            timed: list[float] = []
            while len(timed) < steps and (len(timed) < _MIN_STEPS or sum(timed) < seconds):
                began = time.perf_counter()
                self.engine.step()
                timed.append(time.perf_counter() - began)
            found["steps"][count] = timed
            draft_steps, seconds_in_them = (
                b - a for a, b in zip(clock, self._clock(), strict=True)
            )
            found["drafts"][count] = seconds_in_them / max(1, draft_steps)
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return found

    def accepted(self, prompts: list[list[int]], count: int, max_tokens: int) -> dict[str, Any]:
        """Answer all prompts to their end; tokens per step, and the answers themselves."""
        self._hold(count)
        before = self._accepted_tokens()
        names = self._submit(prompts, max_tokens, ignore_eos=False)
        answers: dict[str, list[int]] = {name: [] for name in names}
        while self.engine.has_unfinished_requests():
            for out in self.engine.step():
                answers[out.request_id] += out.outputs[0].token_ids
        decoded = sum(map(len, answers.values())) - len(answers)
        accepted = self._accepted_tokens() - before
        return {
            "tokens_per_step": decoded / max(1, decoded - accepted),
            "answers": [answers[name] for name in names],
        }

    def _submit(self, prompts: list[list[int]], max_tokens: int, *, ignore_eos: bool) -> list[str]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        names = []
        for ids in prompts:
            self.served += 1
            names.append(f"plan-{self.served}")
            self.engine.add_request(names[-1], {"prompt_token_ids": ids}, params)
        return names

    def _hold(self, count: int) -> None:
        if self.drafts:
            from vllm_specformer.engine.patches.measuring import hold_drafts

            hold_drafts(self.llm, count)

    def _clock(self) -> tuple[float, float]:
        """Draft steps so far and the seconds in them, as /metrics would show them; 0 without."""
        from prometheus_client import REGISTRY

        def value(name: str) -> float:
            return REGISTRY.get_sample_value(name, {"engine": "0"}) or 0.0

        return value(DRAFT_STEPS), value(DRAFT_SECONDS)

    def _accepted_tokens(self) -> int:
        name = "vllm:spec_decode_num_accepted_tokens"
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)


def answers_on_stdout() -> TextIO:
    """A handle on standard output for answers only: what vLLM prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = answers_on_stdout()
    order = json.loads(sys.argv[1])
    try:
        worker = Worker(order["engine"], order["drafts"])
    except (ImportError, TypeError, ValueError) as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({"ready": True}), file=answers, flush=True)
    operations: dict[str, Callable[..., dict[str, Any]]] = {
        "times": worker.times,
        "accepted": worker.accepted,
    }
    for line in sys.stdin:
        asked = json.loads(line)
        answer = operations[asked.pop("do")](**asked)
        print(json.dumps(answer), file=answers, flush=True)
    worker.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
