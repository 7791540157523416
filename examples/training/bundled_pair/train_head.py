"""Train a SpecFormer head on the target's own answers (see distill.py).

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train_head.py --target DIR --data DIR --out DIR

A killed run continues from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.training.checkpoint import load_checkpoint, save_checkpoint
from vllm_specformer.training.distributed import average_gradients, join_group
from vllm_specformer.training.hidden_states import HookedTarget
from vllm_specformer.training.objective import backward_slots, slot_labels
from vllm_specformer.training.optimizers import build_optimizers, set_factor, trapezoid

ROWS, ANCHORS = 32, 20  # texts per step over all processes, anchors drawn in each
SLOT_COUNTS = (2, 4, 4, 8)  # slots run in a step, drawn at random: served heads run what they need


class Texts:
    """All distilled texts in memory, with batches of similar length.

    Which texts step `n` of process `r` sees, and its anchors, depend on the seed only.
    """

    def __init__(self, directory: Path, seed: int, rows: int) -> None:
        self.texts: list[np.ndarray] = []
        self.prompt_lengths: list[int] = []
        for shard in sorted(directory.glob("shard-*.npz")):
            with np.load(shard) as data:
                ends = np.cumsum(data["lengths"])[:-1]
                self.texts += np.split(data["tokens"], ends)
                self.prompt_lengths += data["prompt_lengths"].tolist()
        # The first anchor is the prompt's last token; the last one has a bonus token and a label.
        keep = [i for i, text in enumerate(self.texts) if len(text) >= self.prompt_lengths[i] + 3]
        by_length = sorted(keep, key=lambda i: len(self.texts[i]))
        self.groups = [by_length[i : i + rows] for i in range(0, len(by_length) - rows + 1, rows)]
        self.seed = seed

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [rows, T], lengths [rows], anchors [rows, ANCHORS]."""
        epoch, index = divmod(number, len(self.groups))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.groups))
        chosen = self.groups[order[index]]
        lengths = torch.tensor([len(self.texts[i]) for i in chosen])
        tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        rng = np.random.default_rng((self.seed, 1, number))
        anchors = torch.empty(len(chosen), ANCHORS, dtype=torch.int64)
        for row, i in enumerate(chosen):
            tokens[row, : lengths[row]] = torch.from_numpy(self.texts[i].astype(np.int64))
            first, last = self.prompt_lengths[i] - 1, int(lengths[row]) - 3
            anchors[row] = torch.from_numpy(rng.integers(first, last + 1, ANCHORS))
        return tokens, lengths, anchors


def step_losses(
    head: SpecFormerHead,
    target: HookedTarget,
    batch: tuple[Tensor, ...],
    weights: list[float],
    num_slots: int,
) -> list[float]:
    """Forward and backward of one batch through the first slots; returns each slot's loss, nats."""
    tokens, lengths, anchors = batch
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = target(tokens)
        bonus = tokens.gather(1, anchors + 1)
        slots = head(states, anchors, target.embed(bonus), num_slots)
        labels = slot_labels(tokens, anchors, slots.shape[2], lengths)
        return backward_slots(head, target, slots, bonus, labels, weights)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="default", choices=["paper", "default"])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--markov-rank", type=int, default=64)
    parser.add_argument("--slot-decay", type=float, default=0.85, help="weight of slot i: this**i")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--decay-fraction", type=float, default=0.5)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=2e-3)
    parser.add_argument("--target-name", default="examples/models/python-target")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    rank, world = join_group()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16)
    config = SpecFormerConfig.preset(
        args.preset,
        model.config,
        args.target_name,
        num_draft_slots=args.slots,
        markov_rank=args.markov_rank,
    )
    head = SpecFormerHead(config)
    target = HookedTarget(model, config.aux_hidden_state_layer_ids)
    optimizers = build_optimizers(head, args.muon_lr, args.adamw_lr)
    checkpoint = args.out / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, head, optimizers) if checkpoint.exists() else 0
    data = Texts(args.data, args.seed, ROWS // world)
    weights = [args.slot_decay**i for i in range(args.slots)]

    started, smooth = time.time(), np.full(args.slots, np.log(config.vocab_size))
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=rank > 0)
    for step in bar:
        # The same on every process: the gradients of unused slots must be absent on all of them.
        drawn = int(np.random.default_rng((args.seed, 2, step)).choice(SLOT_COUNTS))
        num_slots = min(drawn, args.slots) if config.nested_slots else args.slots
        batch = data.batch(step * world + rank)
        losses = step_losses(head, target, batch, weights, num_slots)
        average_gradients(head.parameters(), world, max_norm=1.0)
        set_factor(optimizers, trapezoid(step, args.steps, 50, args.decay_fraction))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen = np.flatnonzero(np.isfinite(losses))
        smooth[seen] = 0.98 * smooth[seen] + 0.02 * np.asarray(losses)[seen]
        bar.set_postfix(loss=" ".join(f"{x:.2f}" for x in smooth[:4]))
        done = step + 1
        if rank == 0 and (done % 100 == 0 or done == args.steps):
            save_checkpoint(checkpoint, head, optimizers, done)
            record: dict[str, Any] = {
                "step": done,
                "slot_losses": [round(float(x), 4) for x in smooth],
                "minutes_this_run": round((time.time() - started) / 60, 1),
            }
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
    if rank == 0:
        head.to(torch.bfloat16).save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
