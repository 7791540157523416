"""A training step as `specformer train` takes it beside a plain one: tokens per second, memory.

    python benchmarks/training_step.py      # bundled target, and one with a large vocabulary

The plain step runs the same head on the same texts: one text to a row, padded, the logits of all
slots at once, one backward pass through everything. "Plain, packed" takes our rows instead. Times
are paired, the arms taking turns in one process. Memory is the peak of a step beyond what was there
before: of the allocator on a GPU, resident pages of a process of its own on a CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import Objective, PackedHead
from vllm_specformer.training.packing import Batch, Budget, collate, plan_epoch
from vllm_specformer.training.settings import SLOT_DECAY
from vllm_specformer.training.slot_loss import IGNORED
from vllm_specformer.training.texts import Text, Texts

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "examples" / "models" / "python-target"
RESULT = ROOT / "benchmarks" / "results" / "training-step.json"
ARMS = ("ours", "plain", "plain, packed")
LARGE = {"vocab_size": 151_936, "hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
LARGE |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
Step = Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.memory_of:
        print(json.dumps(memory(args)))
        return 0
    cases = [(target, slots) for target in args.targets for slots in args.slots]
    rows = [row for case in tqdm(cases, desc="cases") for row in measure(*case, args)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(sys.argv), "torch": torch.__version__, "rows": rows}
    record |= {"device": args.device, "machine": platform.machine(), "threads": args.threads}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print_table(rows)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["bundled", "large vocabulary"])
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--anchors-per-text", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Case:
    """A target with a new head, and batches of made-up texts: steps cost the same on any words."""

    def __init__(self, name: str, slots: int, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        dtype = getattr(torch, args.dtype)
        if name == "bundled":
            model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=dtype)
        elif name == "large vocabulary":
            model = Qwen3ForCausalLM(Qwen3Config(**LARGE)).to(dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model.config.architectures = [type(model).__name__]
        config = SpecFormerConfig.preset("default", model.config, name, num_draft_slots=slots)
        self.device, self.dtype, self.slots = torch.device(args.device), dtype, slots
        self.head = PackedHead(config).to(self.device)
        self.target = HookedTarget(
            model.to(self.device).eval().requires_grad_(False), config.aux_hidden_state_layer_ids
        )
        weights = tuple(SLOT_DECAY**slot for slot in range(slots))
        megabytes = 2048 if args.device == "cuda" else 256
        self.objective = Objective(weights, memory=megabytes << 20)
        self.anchors = args.anchors_per_text
        vocabulary = model.config.vocab_size
        self.texts = made_up(args.batch_tokens // 16, vocabulary)
        packed = plan_epoch(self.texts.lengths, Budget(args.batch_tokens), 0, 0)[0]
        self.batches = {"ours": packed, "plain, packed": packed}
        # The same texts: what differs is the step, not what it is about.
        self.batches["plain"] = [[index] for row in packed for index in row]
        self.tokens = int(self.texts.lengths[[i for row in packed for i in row]].sum())

    def rows(self, batch: Batch) -> HookedRows:
        rng = np.random.default_rng(0)
        fields = collate(self.texts, batch, self.anchors, rng)
        fields = {name: value.to(self.device) for name, value in fields.items()}
        with torch.no_grad():
            states, last = self.target(fields["input_ids"], fields["position_ids"])
        return HookedRows(states, last, **fields)

    def step(self, arm: str) -> None:
        self.head.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            rows = self.rows(self.batches[arm])
            if arm == "ours":
                loss = self.head(rows, self.target, self.slots, self.objective)[0]
            else:
                loss = plain_loss(self.head, rows, self.target, self.objective)
        loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def plain_loss(
    head: PackedHead, rows: HookedRows, target: HookedTarget, objective: Objective
) -> torch.Tensor:
    """The same loss, written down as it is defined."""
    num_slots = len(objective.slot_weights)
    slots = head.slot_states(head._context(rows), rows, target, slice(None), num_slots)
    labels = rows.labels(num_slots)
    previous = torch.cat([rows.bonus_tokens[..., None], labels[..., :-1].clamp(min=0)], dim=-1)
    logits = target.logits(slots)
    if head.config.markov_rank:
        logits = logits + head.markov_logits(previous)
    losses = F.cross_entropy(
        logits.flatten(0, 2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    weights = torch.tensor(objective.slot_weights, device=losses.device)
    counts = (labels != IGNORED).sum((0, 1))
    return (losses.sum((0, 1)) / counts.clamp(min=1)) @ (weights / weights.sum())


def made_up(count: int, vocabulary: int) -> Texts:
    """Texts of 40 to 200 tokens, the first quarter a prompt."""
    rng = np.random.default_rng(0)
    texts = []
    for index in range(count):
        length = int(rng.integers(40, 201))
        tokens = rng.integers(vocabulary, size=length).astype(np.int32)
        texts.append(Text(index, tokens, ((length // 4, length),), 0.0))
    return Texts.collect(texts, 200)


def measure(name: str, slots: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm of one target and number of slots."""
    case = Case(name, slots, args)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repeat in range(args.repeats + 1):
        for arm in ARMS:
            started = time.perf_counter()
            case.step(arm)
            if repeat:  # the first warms up
                seconds[arm].append(time.perf_counter() - started)
    rows = []
    for arm in ARMS:
        pairs = [b / a for a, b in zip(seconds[arm], seconds["plain"], strict=True)]
        rows.append(
            {
                "target": name,
                "slots": slots,
                "arm": arm,
                "tokens_per_second": round(case.tokens / statistics.median(seconds[arm])),
                "over_plain": round(statistics.median(pairs), 2),
                "spread": [round(min(pairs), 2), round(max(pairs), 2)],
                "memory_mib": memory_apart(name, slots, arm, args),
            }
        )
    return rows


def memory_apart(name: str, slots: int, arm: str, args: argparse.Namespace) -> int:
    """Peak of a step in a process of its own: what a process gave back is not seen again."""
    command = [sys.executable, __file__, "--memory-of", arm, "--targets", name]
    command += ["--slots", str(slots), "--device", args.device, "--dtype", args.dtype]
    command += ["--batch-tokens", str(args.batch_tokens), "--threads", str(args.threads)]
    command += ["--anchors-per-text", str(args.anchors_per_text)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def memory(args: argparse.Namespace) -> int:
    """MiB that one step takes beyond target, head and texts; gradients count."""
    case = Case(args.targets[0], args.slots[0], args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.step(args.memory_of)
        return (torch.cuda.max_memory_allocated() - before) >> 20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_kib("VmRSS")
    case.step(args.memory_of)
    return (resident_kib("VmHWM") - before) >> 10


def resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print("| target | slots | step | tokens/s | over plain | MiB |\n|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["spread"]
        ratio = "1" if row["arm"] == "plain" else f"{row['over_plain']} ({low}-{high})"
        cells = (row["target"], row["slots"], row["arm"], f"{row['tokens_per_second']:,}", ratio)
        print("| " + " | ".join(map(str, (*cells, f"{row['memory_mib']:,}"))) + " |")


if __name__ == "__main__":
    sys.exit(main())
