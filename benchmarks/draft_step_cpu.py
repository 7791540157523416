"""Where the time of one draft step goes on a CPU, and how much of it is attention and K/V store.

    python benchmarks/draft_step_cpu.py

The proposer and the head of vLLM's V1 runner as they serve the bundled pair, with its trained head,
but no engine around them: hooked states are random, every request has the same context, and each
step verifies K drafts. The target's embedding, final norm and lm_head are PyTorch's with vLLM's
packed matrix. Medians over many steps, of the thread's processor time, go to
benchmarks/results/draft-step-cpu.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Read by vLLM and by OpenMP when they are loaded.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
TARGET, HEAD = (str(ROOT / "examples" / "models" / f"python-{n}") for n in ("target", "specformer"))
RESULT = ROOT / "benchmarks" / "results" / "draft-step-cpu.json"
PAGE_SIZE = 128  # vLLM's choice on a CPU
WARM_UP = 5
# What this library does instead of matrix products; the rest is the head's and the target's.
ATTENTION = ("rotate and store K/V", "prepare the context", "anchor attention", "slot attention")
REST = "everything else"
# The first leaves out what other processes take from the machine.
CLOCKS: dict[str, Callable[[], float]] = {"thread": time.thread_time, "wall": time.perf_counter}


class Stopwatch:
    """Adds up the seconds spent inside methods, by part of the step; parts do not nest."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.clock()
            result = inner(*args, **kwargs)
            self.seconds[part] = self.seconds.get(part, 0.0) + self.clock() - started
            return result

        setattr(owner, method, timed)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    rows = []
    for dtype, drafts in itertools.product(args.dtype, args.num_speculative_tokens):
        proposer = build(args.head, dtype, drafts, max(args.requests))
        watch = Stopwatch(CLOCKS[args.clock])
        watch_parts(watch, proposer)
        for requests in args.requests:
            times = measure(watch, step(proposer, requests, args.context, drafts), args.repeats)
            rows.append({"dtype": dtype, "drafts": drafts, "requests": requests} | times)
    print_tables(rows)
    report = {
        "context": args.context,
        "threads": args.threads,
        "clock": args.clock,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "microseconds": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head", default=HEAD, help="of the bundled target")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=512, help="tokens of each request")
    parser.add_argument(
        "--num-speculative-tokens", type=int, nargs="+", default=[4, 8], metavar="K"
    )
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1, help="as `vllm serve` takes on two cores")
    parser.add_argument("--clock", default="thread", choices=CLOCKS, help="for threads > 1: wall")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(arguments)


def build(head: str, dtype: str, drafts: int, requests: int) -> Any:
    """The proposer without a runner, bound to a target of three layers and to empty pages."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.torch_utils import set_default_torch_dtype

    load_general_plugins()
    from safetensors.torch import load_file
    from vllm.model_executor.layers.attention import Attention

    from vllm_specformer.engine.metrics import DraftClock
    from vllm_specformer.engine.model import SpecFormerDraftModel
    from vllm_specformer.engine.proposer_v1 import SpecFormerProposer

    config = EngineArgs(
        model=TARGET,
        dtype=dtype,
        max_num_seqs=requests,
        speculative_config={
            "method": "specformer",
            "model": head,
            "num_speculative_tokens": drafts,
        },
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        text = config.model_config.hf_text_config
        # The target's layer whose pages the head's are like.
        Attention(
            text.num_attention_heads,
            text.head_dim,
            1.0,
            num_kv_heads=text.num_key_value_heads,
            prefix="model.layers.0.self_attn.attn",
        )
        model = SpecFormerDraftModel(vllm_config=config)
        model.load_weights(load_file(f"{head}/model.safetensors").items())
        target = make_target(load_file(f"{TARGET}/model.safetensors"), model.config)
    model.requires_grad_(False)
    model.bind_target(target)
    proposer = object.__new__(SpecFormerProposer)  # no runner, no buffers: `propose` needs neither
    vars(proposer).update(
        model=model,
        device=torch.device("cpu"),
        clock=DraftClock(torch.device("cpu"), config.parallel_config),
        hidden_size=model.config.hidden_size,
        dtype=config.model_config.dtype,
        _enable_probabilistic_draft_probs=False,
    )
    return proposer


def make_target(weights: dict[str, torch.Tensor], config: Any) -> Any:
    """The ends of the target that a draft step uses, its lm_head packed as vLLM packs it."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    size, dtype = config.hidden_size, torch.get_default_dtype()
    embedding = weights["model.embed_tokens.weight"].to(dtype)
    norm = nn.RMSNorm(size, config.rms_norm_eps).requires_grad_(False)
    norm.weight.copy_(weights["model.norm.weight"])
    lm_head = nn.Linear(size, len(embedding), bias=False).requires_grad_(False)
    lm_head.weight.copy_(embedding)  # tied in this target
    dispatch_cpu_unquantized_gemm(lm_head, remove_weight=False)
    return SimpleNamespace(
        model=SimpleNamespace(embed_tokens=nn.Embedding.from_pretrained(embedding), norm=norm),
        compute_logits=lambda states: lm_head.cpu_linear(states, lm_head.weight, None),
    )


def watch_parts(watch: Stopwatch, proposer: Any) -> None:
    from vllm_specformer.engine.cpu.pages import CpuContext

    model, head, attention = proposer.model, proposer.model.head, proposer.model.attn
    for owner, method, part in (
        (model, "combine_hidden_states", "combine the hooked states"),
        (head.context_attn, "key_value", "context projections"),
        (head.context_attn, "query", "context projections"),
        (attention, "store", "rotate and store K/V"),
        (attention, "begin", "prepare the context"),
        # Made anew by every step, hence the class.
        (CpuContext, "anchors", "anchor attention"),
        (head, "expand", "open the slots"),
        (head, "slot_qkv", "slot projections, rotation"),
        (CpuContext, "slots", "slot attention"),
        (head, "finish", "slot output, SwiGLU"),
        (proposer, "_sample", "logits, Markov term, argmax"),
    ):
        watch.watch(owner, method, part)


def measure(watch: Stopwatch, call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Medians of one step's parts, in microseconds."""
    times: dict[str, list[float]] = {}
    for repeat in range(WARM_UP + repeats):
        watch.seconds.clear()
        started = watch.clock()
        call()
        total = watch.clock() - started
        if repeat < WARM_UP:
            continue
        parts = watch.seconds | {REST: total - sum(watch.seconds.values()), "step": total}
        for part, seconds in parts.items():
            times.setdefault(part, []).append(1e6 * seconds)
    medians = {part: round(statistics.median(values), 1) for part, values in times.items()}
    whole = medians.pop("step")
    shares = [
        sum(parts) / total
        for *parts, total in zip(*(times[part] for part in (*ATTENTION, "step")), strict=True)
    ]
    return {
        "parts": medians,
        "step": whole,
        "attention_and_store_share": round(statistics.median(shares), 3),
    }


def step(proposer: Any, requests: int, context: int, drafts: int) -> Callable[[], Any]:
    """One call of `propose`, after every request verified K drafts; all of them were accepted."""
    attention, config = proposer.model.attn, proposer.model.config
    rows = drafts + 1
    pages = -(-(context + drafts) // PAGE_SIZE)
    (layer,), head = attention.layers, attention.shape
    shape = (requests * pages + 1, head.kv_heads, PAGE_SIZE, 2 * head.head_size)
    counts = torch.full((requests,), pages)
    attention.block_counts = lambda: counts
    layer.kv_cache = torch.randn(shape).to(proposer.dtype)
    table = torch.randperm(requests * pages, dtype=torch.int32).view(requests, pages) + 1
    positions = torch.arange(context - rows, context).expand(requests, rows)
    slots = table.gather(1, positions // PAGE_SIZE) * PAGE_SIZE + positions % PAGE_SIZE
    hooks = len(config.aux_hidden_state_layer_ids) * config.hidden_size
    common = SimpleNamespace(
        batch_size=lambda: requests,
        slot_mapping=slots.flatten().long(),
        block_table_tensor=table,
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32) * rows,
    )
    arguments = (
        drafts,
        None,
        positions.flatten(),
        torch.randn(requests * rows, hooks).to(proposer.dtype),
        torch.randint(config.vocab_size, (requests,), dtype=torch.int32),
        None,
        common,
        SimpleNamespace(all_greedy=True),
    )
    return lambda: proposer.propose(*arguments)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    for (dtype, drafts), lines in itertools.groupby(rows, lambda r: (r["dtype"], r["drafts"])):
        group = list(lines)
        title = f"{dtype}, K={drafts}, microseconds"
        table = Table(title, *(f"{row['requests']} requests" for row in group))
        for part in group[0]["parts"]:
            table.add_row(part, *(f"{row['parts'][part]:.0f}" for row in group))
        table.add_row("step", *(f"{row['step']:.0f}" for row in group))
        shares = (f"{row['attention_and_store_share']:.0%}" for row in group)
        table.add_row("attention and store", *shares)
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
