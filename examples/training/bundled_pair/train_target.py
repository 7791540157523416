"""Train the bundled target: a small Qwen3 that writes Python functions.

Run alone or, faster on two cores, as two single-threaded data-parallel processes:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train_target.py --corpus DIR --out DIR

A killed run continues from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import load_checkpoint, save_checkpoint
from distributed import average_gradients, join_group
from schedule import set_factor, trapezoid
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from vllm_specformer.training.optimizers import build_optimizers

SEQUENCE = 512
ROWS_PER_STEP = 16  # over all processes: 8192 tokens


def target_config(vocab_size: int, end_id: int, pad_id: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )


class Batches:
    """Rows of `SEQUENCE + 1` tokens: every epoch a new shuffle and a new phase of the stream.

    Row `n` of the run depends on the seed only, so a resumed run sees the same rows.
    """

    def __init__(self, stream: np.ndarray, seed: int) -> None:
        self.stream, self.seed = stream, seed
        self.rows_per_epoch = (len(stream) - 1) // SEQUENCE - 1
        self.epoch = -1

    def row(self, number: int) -> np.ndarray:
        epoch, index = divmod(number, self.rows_per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.phase = int(rng.integers(SEQUENCE))
            self.order = rng.permutation(self.rows_per_epoch)
            self.epoch = epoch
        start = self.phase + int(self.order[index]) * SEQUENCE
        return self.stream[start : start + SEQUENCE + 1].astype(np.int64)

    def __call__(self, numbers: range) -> Tensor:
        return torch.from_numpy(np.stack([self.row(n) for n in numbers]))


def mean_loss(model: nn.Module, rows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: np.ndarray, rows: int = 256) -> float:
    """Mean cross entropy, nats per token, over the first rows of the held-out stream, in order."""
    rows = min(rows, (len(stream) - 1) // SEQUENCE)
    losses = []
    for first in range(0, rows, 8):
        starts = range(first * SEQUENCE, min(first + 8, rows) * SEQUENCE, SEQUENCE)
        batch = np.stack([stream[s : s + SEQUENCE + 1].astype(np.int64) for s in starts])
        losses.append(float(mean_loss(model, torch.from_numpy(batch))) * len(batch))
    return sum(losses) / rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600, help="steps of 8192 tokens")
    parser.add_argument("--decay-fraction", type=float, default=0.45)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)

    rank, world = join_group()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.corpus / "tokenizer")
    train = np.load(args.corpus / "train.npy", mmap_mode="r")
    held = np.load(args.corpus / "held_out.npy", mmap_mode="r")
    config = target_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = Qwen3ForCausalLM(config)
    optimizers = build_optimizers(model, args.muon_lr, args.adamw_lr)
    checkpoint = args.out / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, model, optimizers) if checkpoint.exists() else 0
    forward = torch.compile(model) if args.compile else model

    batches = Batches(train, args.seed)
    per_rank = ROWS_PER_STEP // world
    parameters = [p for p in model.parameters() if p.requires_grad]
    started = time.time()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=rank > 0)
    for step in bar:
        start = step * ROWS_PER_STEP + rank * per_rank
        loss = mean_loss(forward, batches(range(start, start + per_rank)))
        loss.backward()
        average_gradients(parameters, world, max_norm=1.0)
        set_factor(optimizers, trapezoid(step, args.steps, 50, args.decay_fraction))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        done = step + 1
        if rank == 0 and (done % 100 == 0 or done == args.steps):
            save_checkpoint(checkpoint, model, optimizers, done)
        if rank == 0 and (done % 400 == 0 or done == args.steps):
            record = {
                "step": done,
                "tokens": done * ROWS_PER_STEP * SEQUENCE,
                "held_out_loss": round(held_out_loss(model, held), 4),
                "minutes_this_run": round((time.time() - started) / 60, 1),
            }
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
    if rank == 0:
        model.to(torch.bfloat16).save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
