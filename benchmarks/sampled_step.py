"""A training step that scores a sample of the vocabulary, beside one that scores all of it.

    make target
    python benchmarks/sampled_step.py --data answers        # SmolLM2's head and answers

For each size of the sample: seconds of the head's loss and gradient (the arms take turns on every
batch, medians), how far the loss is off, and the cosine between the two gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.data.shards import read_shards
from vllm_specformer.target.files import find_target, target_record
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import Objective, PackedHead
from vllm_specformer.training.packing import Budget, collate, plan_epoch
from vllm_specformer.training.settings import KL_WEIGHT, SLOT_DECAY
from vllm_specformer.training.slot_loss import Mix
from vllm_specformer.training.texts import Texts, read_texts

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
RESULT = ROOT / "benchmarks" / "results" / "sampled-step.json"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    target = load_target(args.target, torch.float32, torch.device("cpu"))
    head = PackedHead.from_pretrained(args.head, dtype=torch.float32)
    hooked = HookedTarget(target, head.config.aux_hidden_state_layer_ids)
    if head.draft_token_ids is not None:
        hooked.score_only(head.draft_token_ids)
    batches = [run_target(hooked, fields, True) for fields in read_batches(args)]
    arms = [0, *args.sizes]
    found: dict[int, list[tuple[float, float, torch.Tensor]]] = {size: [] for size in arms}
    for rows in tqdm(batches, desc="batches"):
        for size in arms:
            found[size].append(step(head, hooked, rows, args.slots, size))
    rows_out = [compare(found[0], found[size], size) for size in arms]
    record = {"command": " ".join(sys.argv), "slots": args.slots, "threads": args.threads}
    record |= {"scored_tokens": head.config.num_scored_tokens, "rows": rows_out}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("| scored | seconds | loss off by | cosine of gradients |\n|---:|---:|---:|---:|")
    for row in rows_out:
        print(
            f"| {row['size'] or 'all'} | {row['seconds']} | {row['loss_off']} | {row['cosine']} |"
        )
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=Path, default=MODELS / "smollm2-target")
    parser.add_argument("--head", type=Path, default=MODELS / "smollm2-specformer")
    parser.add_argument("--data", type=Path, required=True, help="what `distill` wrote")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 4096, 2048])
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(arguments)


def read_batches(args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Fields of the first batches of an epoch over the first file of answers, all anchors."""
    name = str(args.target)
    place, commit = find_target(name, None)
    fingerprint = target_record(name, place, commit).fingerprint
    tables = islice(read_shards(args.data, read_manifest(args.data, fingerprint, True)), 1)
    texts = Texts.collect(read_texts(tables), 2048)
    plan = plan_epoch(texts.lengths, Budget(args.batch_tokens, None, True), 0, 0)
    rng = np.random.default_rng(0)
    return [collate(texts, batch, None, rng) for batch in plan[: args.batches]]


def step(
    head: PackedHead, target: HookedTarget, rows: HookedRows, slots: int, size: int
) -> tuple[float, float, torch.Tensor]:
    """Seconds, loss, and the gradient of all but the Markov tables, which only sampled rows get."""
    head.zero_grad()
    weights = tuple(SLOT_DECAY**slot for slot in range(slots))
    started = time.process_time()
    loss, _ = head(rows, target, slots, Objective(weights, Mix(KL_WEIGHT), sample=size))
    loss.backward()
    seconds = time.process_time() - started
    named = head.named_parameters()
    parts = [p.grad.flatten() for name, p in named if "markov" not in name and p.grad is not None]
    return seconds, float(loss.detach()), torch.cat(parts).double()


def compare(full: Sequence[Any], arm: Sequence[Any], size: int) -> dict[str, Any]:
    """The medians of an arm over the batches."""
    off = [abs(b[1] / a[1] - 1) for a, b in zip(full, arm, strict=True)]
    cosine = [float(F.cosine_similarity(a[2], b[2], 0)) for a, b in zip(full, arm, strict=True)]
    return {
        "size": size,
        "seconds": round(statistics.median(one[0] for one in arm), 2),
        "loss_off": round(statistics.median(off), 4),
        "cosine": round(statistics.median(cosine), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
