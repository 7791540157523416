"""Where a step's time goes: real engines on this machine, with timers around a step's parts.

    python benchmarks/step_profile.py                            # the bundled pair
    python benchmarks/step_profile.py --target build/heavy/target --head build/heavy/head
    python benchmarks/step_profile.py --context 512 --clock thread --name context-512

One engine after the other in processes of their own: no speculation, K = 0, K tokens. All requests
decode; parts are exclusive of each other, and the median over the steps counts. The thread's clock
leaves out what other processes take from the machine. Results: benchmarks/results/
step-profile-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_specformer.engine.patches.measuring import listing_schedule
from vllm_specformer.environment import hardware, versions
from vllm_specformer.serving.engine import Engine
from vllm_specformer.serving.engine_process import EngineProcess

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"
PATH = os.environ.get("PYTHONPATH")
_SETTLING_STEPS = 5
SHORT = 64  # tokens that are more than any of the texts has

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
    "draft: K/V, query": (f"{_MODEL}.normalise", f"{_MODEL}.store_context_and_query"),
    "draft: rotate and store K/V": ("vllm_specformer.engine.attention:DraftAttention.store",),
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
DRAFT = [part for part in PARTS if part.startswith("draft: ")]
# What this library does in a draft instead of matrix products.
ATTENTION = [part for part in DRAFT if "attention" in part or "store" in part]
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


class Clock:
    """Time of each part without the parts called from within it."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.spent: dict[str, float] = dict.fromkeys([*PARTS, REST], 0.0)
        self._now, self._part, self._since = now, REST, now()

    def enter(self, part: str) -> str:
        """Go over to another part; returns the one before, to come back to."""
        now, before = self._now(), self._part
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
    timed = clock.around("target logits", target.compute_logits)  # type: ignore[attr-defined]
    target.compute_logits = timed  # type: ignore[attr-defined]
    for part, functions in PARTS.items():
        for function in functions:
            module, _, path = function.partition(":")
            owner, _, name = path.partition(".")
            owning = getattr(importlib.import_module(module), owner)
            setattr(owning, name, clock.around(part, getattr(owning, name)))


def profile(
    engine: Engine, drafts: int, requests: list[int], steps: int, context: int, clock: str
) -> dict[str, Any]:
    """In the engine's process: medians over steps, in seconds, by number of requests."""
    watch = Clock(CLOCKS[clock])
    put_timers(watch, engine.llm.apply_model(type)[0])
    engine.hold_drafts(drafts)
    model, found = engine.config.model_config, {}
    for count in requests:
        texts = prompts(count, context, model.get_vocab_size())
        names = engine.submit_endless(texts, model.max_model_len - (context or SHORT))
        engine.read_prompts(names)
        for _ in range(_SETTLING_STEPS):
            engine.step()
        taken = [watch.step(engine.step) for _ in range(steps)]
        if engine.llm.llm_engine.get_num_unfinished_requests() < count:
            raise SystemExit("requests ended while they were timed; give a smaller --steps")
        engine.abort(names)
        engine.finish()
        found[str(count)] = medians(taken)
    return found


def prompts(count: int, context: int, vocabulary: int) -> Sequence[str | list[int]]:
    """Texts, or random tokens where contexts are to have a length."""
    if not context:
        return [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:count]]
    draw = random.Random(0)
    return [[draw.randrange(3, vocabulary) for _ in range(context)] for _ in range(count)]


def medians(steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of a step, its parts, its draft, and the share of the draft that attention and store take."""
    drafts = [sum(step[part] for part in DRAFT) for step in steps]
    parts = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
    found = {
        "step": statistics.median(sum(step.values()) for step in steps),
        "parts": {part: seconds for part, seconds in parts.items() if seconds > 0},
    }
    if all(drafts):
        found["draft"] = statistics.median(drafts)
        found["attention_and_store_share"] = statistics.median(
            sum(step[part] for part in ATTENTION) / draft
            for step, draft in zip(steps, drafts, strict=True)
        )
    return found


def measure(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """One arm, "none" or a number of drafted tokens, in an engine of its own."""
    k, most = args.num_speculative_tokens, max(args.requests)
    # Every step gains at most K + 1 tokens.
    room = (args.steps + 2 * _SETTLING_STEPS + most) * (k + 1)
    engine: dict[str, Any] = {
        "model": str(args.target), "dtype": args.dtype, "enforce_eager": True,
        "max_model_len": min(room + (args.context or SHORT), args.max_model_len),
        "max_num_seqs": most, "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False, "max_num_batched_tokens": 8192,
    }  # fmt: skip
    if arm != "none":
        engine["speculative_config"] = {
            "method": "specformer", "model": str(args.head), "num_speculative_tokens": k,
            "num_speculative_tokens_per_batch_size": listing_schedule([0, k]),
        }  # fmt: skip
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(args.threads),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [PATH])]),
    }  # fmt: skip
    how = {name: getattr(args, name) for name in ("requests", "steps", "context", "clock")}
    with EngineProcess(engine, environment=environment) as process:
        return process.call("step_profile:profile", drafts=0 if arm == "none" else int(arm), **how)


def table(figures: dict[str, Any], requests: Sequence[int]) -> str:
    """Milliseconds of a step by part, arms side by side for every number of requests."""
    columns = [(arm, figures[arm][str(count)]) for count in requests for arm in figures]
    names = [f"{arm}, {count}" for count in requests for arm in figures]
    lines = [f"| ms | {' | '.join(names)} |", "|---" * (len(columns) + 1) + "|"]
    for part in ["step", "draft", *PARTS, REST]:
        found = [here["parts"].get(part, here.get(part)) for _, here in columns]
        if any(found):
            cells = ["" if seconds is None else f"{1000 * seconds:.2f}" for seconds in found]
            name = f"**{part}**" if part in ("step", "draft") else part
            lines.append(f"| {name} | {' | '.join(cells)} |")
    shares = [here.get("attention_and_store_share") for _, here in columns]
    if any(shares):
        cells = ["" if share is None else f"{share:.0%}" for share in shares]
        lines.append(f"| attention and store, of the draft | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=Path, default=MODELS / "python-target")
    parser.add_argument("--head", type=Path, default=MODELS / "python-specformer")
    parser.add_argument("--name", default="bundled", help="in the results' file names")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of none and 0 to K (none 0 K)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=0, help="tokens; default: short texts")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="as `vllm serve` takes on two cores")
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    args.results.mkdir(parents=True, exist_ok=True)
    arms = args.arms or ["none", "0", str(args.num_speculative_tokens)]
    figures = {arm if arm == "none" else f"K={arm}": measure(args, arm) for arm in arms}
    shown = table(figures, args.requests)
    about = {
        "target": args.target.name, "head": args.head.name, "dtype": args.dtype,
        "threads": args.threads, "steps": args.steps, "context": args.context,
        "clock": args.clock, "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    path = args.results / f"step-profile-{args.name}"
    path.with_suffix(".json").write_text(json.dumps(about | {"seconds": figures}, indent=1) + "\n")
    path.with_suffix(".md").write_text(shown)
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
