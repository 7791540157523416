"""What a window over the head's context brings: acceptance by window, draft time by context.

    python benchmarks/context_windows.py       # benchmarks/results/context-windows.json, 4 minutes
    python benchmarks/context_windows.py --long      # adds SmolLM2 behind 3,000 tokens

Acceptance is that of heads that were trained on whole contexts, replayed with a window: the bundled
one, and SmolLM2's on held-out questions behind other texts. Time is that of both attentions of a
draft step on this CPU (float32, one thread, its own processor time), of the shape of a head for
Qwen3-8B.
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
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.data.shards import read_rows
from vllm_specformer.distill.distill import distill
from vllm_specformer.distill.settings import DistillSettings
from vllm_specformer.evaluation.evaluate import evaluate
from vllm_specformer.evaluation.metrics import ALL, served_method
from vllm_specformer.evaluation.settings import EvalSettings

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
PROMPTS = ROOT / "benchmarks" / "prompts-load.jsonl"
QUESTIONS = ROOT / "examples" / "training" / "english" / "held_out.jsonl"
CHARACTERS = 12_000  # of what stands before a question: about 3,000 tokens
RESULT = ROOT / "benchmarks" / "results" / "context-windows.json"
HEADS, KV_HEADS, HEAD_SIZE, PAGE, SLOTS = 32, 8, 128, 16, 4
SINKS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 16, 32, 64, 128])
    parser.add_argument("--long-windows", type=int, nargs="+", default=[0, 64, 256, 1024])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32_768, 131_072])
    parser.add_argument("--served-window", type=int, default=2048, help="of the timed heads")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--long-prompts", type=int, default=8)
    parser.add_argument("--long", action="store_true", help="only SmolLM2, beside what is there")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = {"command": " ".join(sys.argv)}
    record = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if args.long:
        record["long"] = command | long_acceptance(args.long_windows, args.long_prompts)
    else:
        record |= command | {"sinks": SINKS}
        record["acceptance"] = [
            acceptance("python", PROMPTS, window, args.prompts)
            for window in tqdm(args.windows, desc="windows")
        ]
        record["times"] = [
            attention_time(context, window, args.repeats)
            for context in tqdm(args.contexts, desc="contexts")
            for window in (0, args.served_window)
        ]
    write_atomic(RESULT, (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record, indent=1))
    return 0


def acceptance(pair: str, prompts: Path, window: int, count: int) -> dict[str, Any]:
    """Tokens per step of a bundled head at K=4 and 8, greedy, on answers or to prompts."""
    head = MODELS / f"{pair}-specformer"
    where = {"data": prompts} if prompts.is_dir() else {"prompts": (prompts,)}
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        config = json.loads((head / "config.json").read_text())
        config |= {"context_window": window, "context_sinks": SINKS if window else 0}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "model.safetensors").symlink_to(head / "model.safetensors")
        report = evaluate(
            EvalSettings(
                head=copy,
                target=str(MODELS / f"{pair}-target"),
                max_prompts=count,
                num_speculative_tokens=(4, 8),
                temperature=(0.0,),
                max_tokens=128,
                dtype="float32" if pair == "python" else "bfloat16",
                **where,
            )
        )
    (group,) = report["offline"].values()
    part = group[ALL]
    found = {k: part[served_method(part)][k]["tokens_per_step"] for k in ("K=4", "K=8")}
    return {"window": window, "prompts": count, **found}


def long_acceptance(windows: Sequence[int], count: int) -> dict[str, Any]:
    """SmolLM2's head on questions behind `CHARACTERS` of other texts, answered once."""
    with tempfile.TemporaryDirectory() as name:
        prompts, answers = Path(name) / "long.jsonl", Path(name) / "answers"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in long_prompts(count)))
        distill(
            DistillSettings(
                target=str(MODELS / "smollm2-target"),
                prompts=(prompts,),
                out=answers,
                max_tokens=128,
                sampled_share=0.0,
                dtype="bfloat16",
                max_model_len=4096,
                engine_args={"enforce_eager": True, "kv_cache_memory_bytes": 1 << 29},
            )
        )
        lengths = [len(text.input_ids) for text in read_rows(answers, read_manifest(answers))]
        rows = [
            acceptance("smollm2", answers, window, count)
            for window in tqdm(windows, desc="windows, long texts")
        ]
    return {"tokens": sorted(lengths), "acceptance": rows}


def long_prompts(count: int) -> list[dict[str, Any]]:
    """The last question of each is a held-out one; what stands before it are other such texts."""
    asked = [json.loads(line)["messages"][0]["content"] for line in QUESTIONS.open()]
    stride = len(asked) // count
    found = []
    for place in range(0, count * stride, stride):
        others = asked[place + 1 :] + asked[:place]
        before = "\n\n".join(others)[:CHARACTERS]
        content = f"Some notes:\n\n{before}\n\nNow to my question. {asked[place]}"
        found.append({"messages": [{"role": "user", "content": content}]})
    return found


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
