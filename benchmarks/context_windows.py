"""What a window over the head's context brings: acceptance by window, draft time by context.

    python benchmarks/context_windows.py       # benchmarks/results/context-windows.json, 4 minutes

Acceptance is that of the bundled head, which was trained on whole contexts, replayed with a window.
Time is that of both attentions of a draft step
on this CPU (float32, one thread, its own processor time), of the shape of a head for Qwen3-8B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from specformer_kernels.block_attention import block_attention
from tqdm import tqdm

from vllm_specformer.data.files import write_atomic
from vllm_specformer.evaluation.evaluate import evaluate
from vllm_specformer.evaluation.metrics import ALL, served_method
from vllm_specformer.evaluation.settings import EvalSettings

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
RESULT = ROOT / "benchmarks" / "results" / "context-windows.json"
HEADS, KV_HEADS, HEAD_SIZE, PAGE, SLOTS = 32, 8, 128, 16, 4
SINKS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 16, 32, 64, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32_768, 131_072])
    parser.add_argument("--served-window", type=int, default=2048, help="of the timed heads")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = [acceptance(window, args.prompts) for window in tqdm(args.windows, desc="windows")]
    times = [
        attention_time(context, window, args.repeats)
        for context in tqdm(args.contexts, desc="contexts")
        for window in (0, args.served_window)
    ]
    record = {"command": " ".join(sys.argv), "sinks": SINKS, "acceptance": found, "times": times}
    write_atomic(RESULT, (json.dumps(record, indent=1) + "\n").encode())
    for row in (*found, *times):
        print(row)
    return 0


def acceptance(window: int, prompts: int) -> dict[str, Any]:
    """Tokens per step of the bundled head at K=4 and 8, greedy."""
    head = MODELS / "python-specformer"
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        config = json.loads((head / "config.json").read_text())
        config |= {"context_window": window, "context_sinks": SINKS if window else 0}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "model.safetensors").symlink_to(head / "model.safetensors")
        report = evaluate(
            EvalSettings(
                head=copy,
                target=str(MODELS / "python-target"),
                prompts=(ROOT / "benchmarks" / "prompts-load.jsonl",),
                max_prompts=prompts,
                num_speculative_tokens=(4, 8),
                temperature=(0.0,),
                max_tokens=128,
                dtype="float32",
            )
        )
    (group,) = report["offline"].values()
    part = group[ALL]
    found = {k: part[served_method(part)][k]["tokens_per_step"] for k in ("K=4", "K=8")}
    return {"window": window, "prompts": prompts, **found}


def attention_time(context: int, window: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of an anchor's and of its slots' attention for one request, the median."""
    pages = -(-context // PAGE)
    cache = torch.randn(pages, KV_HEADS, PAGE, 2 * HEAD_SIZE)
    table = torch.randperm(pages, dtype=torch.int32)[None]
    lens = torch.tensor([context])
    seconds = []
    for _ in range(repeats + 1):
        started = time.thread_time()
        for rows, word in ((1, 0), (SLOTS, (1 << SLOTS) - 1)):
            query = torch.randn(rows, HEADS, HEAD_SIZE)
            own = torch.randn(rows, KV_HEADS, HEAD_SIZE)
            starts = torch.tensor([0, rows], dtype=torch.int32)
            words = torch.full((rows,), word)
            scale, sinks = HEAD_SIZE**-0.5, SINKS if window else 0
            block_attention(
                query, own, own, cache, table, lens, starts, words, scale, rows,
                window=window, sinks=sinks,
            )  # fmt: skip
        seconds.append(time.thread_time() - started)
    return {"context": context, "window": window, "ms": round(1e3 * statistics.median(seconds), 2)}


if __name__ == "__main__":
    sys.exit(main())
