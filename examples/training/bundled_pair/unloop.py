"""Teach the trained target to leave its loops (sequence-level unlikelihood training).

Small models decoded greedily fall into loops. A head that drafts loops looks better than it is, and
loops are no text anybody wants, so the target learns from its own failures: it continues training
prompts greedily, every token that completes a 4-gram the continuation already contains is marked,
and the marked tokens' probabilities are pushed down while ordinary training goes on beside it.
Method: Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020
(arXiv 1908.04319), section 5.2.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 unloop.py --corpus DIR --target DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from completions import BATCH, complete
from distributed import average_gradients, join_group
from prompts import prompts as usable_prompts
from torch import Tensor, nn
from tqdm import tqdm
from train_target import ROWS_PER_STEP, Batches, held_out_loss, mean_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_specformer.training.acceptance import repeated_fraction

MAX_NEW = 128
LOOP_ROWS = 16  # looping texts per process and step
CLIP = 1e-4


def marked(answer: list[int]) -> list[bool]:
    """Which tokens complete a 4-gram that occurred before in the answer."""
    seen: set[tuple[int, ...]] = set()
    flags = [False] * len(answer)
    for end in range(4, len(answer) + 1):
        gram = tuple(answer[end - 4 : end])
        flags[end - 1] = gram in seen
        seen.add(gram)
    return flags


def looping_texts(
    model: PreTrainedModel, prompts: list[list[int]]
) -> tuple[list[tuple[list[int], list[bool]]], float]:
    """Greedy continuations that contain marked tokens, and the mean repeated fraction of all."""
    model.eval()
    found, repeated = [], []
    prompts = sorted(prompts, key=len)
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        for prompt, answer in zip(batch, complete(model, batch, MAX_NEW), strict=True):
            repeated.append(repeated_fraction(answer))
            flags = marked(answer)
            if any(flags):
                found.append((prompt + answer, [False] * len(prompt) + flags))
    return found, sum(repeated) / len(repeated)


def unlikelihood(model: nn.Module, texts: list[tuple[list[int], list[bool]]]) -> Tensor:
    """Mean over marked tokens of -log(1 - p(token))."""
    width = max(len(tokens) for tokens, _ in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    flags = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (tokens, marks) in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        flags[row, : len(marks)] = torch.tensor(marks)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    taken = -F.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view_as(ids[:, 1:])
    miss = (1 - taken.exp()).clamp(min=CLIP)
    return -(miss.log() * flags[:, 1:]).sum() / flags[:, 1:].sum()


@torch.no_grad()
def blend(model: PreTrainedModel, start: Path, share: float) -> None:
    """Move `model` back towards the weights it started from, keeping `share` of the change.

    Between the two lies nearly all of the benefit at little of the cost in held-out loss
    (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903).
    """
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        new.lerp_(old, 1 - share)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True, help="model directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=1024, help="per round")
    parser.add_argument("--steps", type=int, default=60, help="per round")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--blend", type=float, default=0.5, help="share of the new weights kept")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rank, world = join_group()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    batches = Batches(np.load(args.corpus / "train.npy", mmap_mode="r"), args.seed + 1)
    # Prompts that distillation will not use again: the end of the list.
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = tokenizer(usable_prompts(args.corpus, "train", 100_000))["input_ids"][::-1]
    rng = np.random.default_rng(args.seed)
    total = args.rounds * args.steps
    for round_ in range(args.rounds):
        mine = prompts[round_ * args.prompts : (round_ + 1) * args.prompts][rank::world]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            loops, repeated = looping_texts(model, mine)
        if rank == 0:
            record = {
                "round": round_,
                "repeated_4grams": round(repeated, 4),
                "held_out_loss": round(
                    held_out_loss(model, np.load(args.corpus / "held_out.npy")), 4
                ),
            }
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
        model.train()
        for step in tqdm(range(args.steps), desc=f"round {round_}", disable=rank > 0):
            done = round_ * args.steps + step
            start = done * ROWS_PER_STEP + rank * (ROWS_PER_STEP // world)
            loss = mean_loss(model, batches(range(start, start + ROWS_PER_STEP // world)))
            loss.backward()
            chosen = [loops[i] for i in rng.integers(len(loops), size=LOOP_ROWS)]
            unlikelihood(model, chosen).backward()
            average_gradients(model.parameters(), world, max_norm=1.0)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * (1 - done / total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    if rank == 0:
        blend(model, args.target, args.blend)
        held = held_out_loss(model, np.load(args.corpus / "held_out.npy"))
        with (args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps({"round": "end", "held_out_loss": round(held, 4)}) + "\n")
        model.to(torch.bfloat16).save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
