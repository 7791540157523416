"""Where a step's time goes: real engines on this machine, with timers around a step's parts.

    python benchmarks/step_profile.py                            # the bundled pair
    python benchmarks/step_profile.py --target build/heavy/target --head build/heavy/head

One engine after the other in processes of their own: no speculation, K = 0, K tokens. All requests
decode; parts are exclusive of each other, and the median over the steps counts. Results:
benchmarks/results/step-profile-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_specformer.environment import hardware, versions
from vllm_specformer.serving.server import server_environment

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"
_SETTLING_STEPS = 5

# Part of a step -> functions it is made of, as "module:Class.function". Drafting comes last.
_RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
_MODEL = "vllm_specformer.engine.model:SpecFormerDraftModel"
_PROPOSER = "vllm_specformer.engine.proposer_v1:SpecFormerProposer"
_CPU = "vllm_specformer.engine.cpu.pages:CpuContext"
PARTS = {
    "scheduler": (
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids",
    ),
    "runner: inputs": (
        f"{_RUNNER}._update_states",
        f"{_RUNNER}._prepare_inputs",
        f"{_RUNNER}._get_slot_mappings",
        f"{_RUNNER}._preprocess",
    ),
    "runner: attention metadata": (f"{_RUNNER}._build_attention_metadata",),
    "target forward": (f"{_RUNNER}._model_forward",),
    "target logits": (),  # of whatever class the target is
    "verification and sampling": (f"{_RUNNER}._sample", f"{_RUNNER}._bookkeeping_sync"),
    "runner: the rest": (f"{_RUNNER}.execute_model", f"{_RUNNER}.sample_tokens"),
    "output": ("vllm.v1.engine.output_processor:OutputProcessor.process_outputs",),
    "runner: around the draft": (f"{_RUNNER}.propose_draft_token_ids",),
    "draft: combine the hooks": (f"{_MODEL}.combine_hidden_states",),
    "draft: K/V, store, query": (f"{_MODEL}.normalise", f"{_MODEL}.store_context_and_query"),
    "draft: anchor attention": (
        "vllm_specformer.engine.attention:DraftAttention.begin",
        f"{_CPU}.anchors",
    ),
    "draft: open the slots": ("vllm_specformer.head:SpecFormerHead.expand",),
    "draft: slot projections, SwiGLU": ("vllm_specformer.head:SpecFormerHead.run_slots",),
    "draft: slot attention": (f"{_CPU}.slots",),
    "draft: logits": (f"{_MODEL}.compute_logits",),
    "draft: Markov term, choice": (f"{_PROPOSER}._sample",),
    "draft: the rest": (f"{_PROPOSER}.propose", f"{_MODEL}.forward"),
}
REST = "engine: the rest"


class Clock:
    """Time of each part without the parts called from within it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys([*PARTS, REST], 0.0)
        self._part, self._since = REST, time.perf_counter()

    def enter(self, part: str) -> str:
        """Go over to another part; returns the one before, to come back to."""
        now, before = time.perf_counter(), self._part
        self.spent[before] += now - self._since
        self._part, self._since = part, now
        return before

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return timed

    def step(self, step: Callable[[], Any]) -> dict[str, float]:
        """Seconds per part of one step."""
        self.enter(REST)
        self.spent = dict.fromkeys(self.spent, 0.0)
        step()
        self.enter(REST)
        return self.spent


def put_timers(clock: Clock, target: type) -> None:
    import importlib

    timed = clock.around("target logits", target.compute_logits)  # type: ignore[attr-defined]
    target.compute_logits = timed  # type: ignore[attr-defined]
    for part, functions in PARTS.items():
        for function in functions:
            module, _, path = function.partition(":")
            owner, _, name = path.partition(".")
            owning = getattr(importlib.import_module(module), owner)
            setattr(owning, name, clock.around(part, getattr(owning, name)))


def work(order: dict[str, Any]) -> dict[str, Any]:
    """One engine: medians over steps, in seconds, by number of requests."""
    import vllm
    from vllm import SamplingParams

    from vllm_specformer.engine.patches.measuring import hold_drafts

    llm = vllm.LLM(**order["engine"])
    engine, drafts = llm.llm_engine, order["drafts"]
    clock = Clock()
    put_timers(clock, llm.apply_model(type)[0])
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    params = SamplingParams(temperature=0, max_tokens=order["room"], ignore_eos=True)
    found: dict[str, Any] = {}
    for requests in order["requests"]:
        if drafts is not None:
            hold_drafts(llm, drafts)
        names = [f"{requests}-{number}" for number in range(requests)]
        for name, text in zip(names, texts, strict=False):
            engine.add_request(name, text, params)
        started: set[str] = set()
        while len(started) < requests:
            started |= {out.request_id for out in engine.step()}
        for _ in range(_SETTLING_STEPS):
            engine.step()
        steps = [clock.step(engine.step) for _ in range(order["steps"])]
        if engine.get_num_unfinished_requests() < requests:
            raise SystemExit("requests ended while they were timed; give a smaller --steps")
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        parts = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
        found[str(requests)] = {
            "step": statistics.median(sum(step.values()) for step in steps),
            "parts": {part: seconds for part, seconds in parts.items() if seconds > 0},
        }
    return found


def run_worker(args: argparse.Namespace, drafts: int | None) -> dict[str, Any]:
    most = max(args.requests)
    # Every step gains at most K + 1 tokens.
    room = (args.steps + 2 * _SETTLING_STEPS + most) * (args.num_speculative_tokens + 1)
    length = min(room + 64, 512)
    engine: dict[str, Any] = {
        "model": str(args.target), "dtype": args.dtype, "enforce_eager": True,
        "max_model_len": length, "max_num_seqs": most, "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False, "max_num_batched_tokens": 8192,
    }  # fmt: skip
    if drafts is not None:
        from vllm_specformer.engine.patches.measuring import listing_schedule

        engine["speculative_config"] = {
            "method": "specformer",
            "model": str(args.head),
            "num_speculative_tokens": args.num_speculative_tokens,
            "num_speculative_tokens_per_batch_size": listing_schedule(
                [0, args.num_speculative_tokens]
            ),
        }
    order = {
        "engine": engine, "drafts": drafts, "requests": args.requests, "steps": args.steps,
        "room": length - 64,
    }  # fmt: skip
    environment = server_environment() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(args.threads),
    }
    command = [sys.executable, __file__, "--worker", json.dumps(order)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def table(figures: dict[str, Any], requests: Sequence[int]) -> str:
    """Milliseconds of a step by part, arms side by side for every number of requests."""
    arms = list(figures)
    columns = [(str(count), arm) for count in requests for arm in arms]
    lines = [
        "| ms | " + " | ".join(f"{arm}, {count}" for count, arm in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for part in ["step", *PARTS, REST]:
        cells = []
        for count, arm in columns:
            here = figures[arm][count]
            seconds = here["step"] if part == "step" else here["parts"].get(part)
            cells.append("" if seconds is None else f"{1000 * seconds:.2f}")
        if any(cells):
            lines.append(
                f"| {'**step**' if part == 'step' else part} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=Path, default=MODELS / "python-target")
    parser.add_argument("--head", type=Path, default=MODELS / "python-specformer")
    parser.add_argument("--name", default="bundled", help="in the results' file names")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        print(json.dumps(work(args.worker)), file=answers, flush=True)
        return 0
    k = args.num_speculative_tokens
    arms: dict[str, int | None] = {"none": None, "K=0": 0, f"K={k}": k}
    figures = {arm: run_worker(args, drafts) for arm, drafts in arms.items()}
    shown = table(figures, args.requests)
    about = {
        "target": args.target.name, "head": args.head.name, "dtype": args.dtype,
        "threads": args.threads, "steps": args.steps, "hardware": hardware(),
        "versions": versions(),
    }  # fmt: skip
    path = args.results / f"step-profile-{args.name}"
    path.with_suffix(".json").write_text(json.dumps(about | {"seconds": figures}, indent=1) + "\n")
    path.with_suffix(".md").write_text(shown)
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
