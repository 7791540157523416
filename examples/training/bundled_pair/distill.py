"""Self-distillation: let the target finish the corpus's functions.

Prompts are signature and docstring (or the first statement) of training functions; the answers are
the target's own, most of them greedy and the rest sampled at temperature 1. A head trained on
anything but its target's own words gains nothing (arXiv 2511.20340: 0.94x against 1.76x).

Work is cut into shards, each written whole; a killed run continues after its last shard.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from corpus import split_prompt
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MAX_PROMPT, MAX_NEW = 160, 160
BATCH = 128


def encode_prompts(corpus: Path, split: str, count: int) -> list[list[int]]:
    """Token ids of the first usable prompts of a split, in corpus order."""
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    texts = []
    for line in (corpus / f"{split}.jsonl").read_text().splitlines():
        prompt, rest = split_prompt(json.loads(line)["text"])
        if rest:
            texts.append(prompt)
        if len(texts) == 2 * count:
            break
    encoded = [ids for ids in tokenizer(texts)["input_ids"] if len(ids) <= MAX_PROMPT]
    return encoded[:count]


@torch.inference_mode()
def complete(
    model: PreTrainedModel, prompts: list[list[int]], temperature: float, max_new: int = MAX_NEW
) -> list[list[int]]:
    """Continuations without the prompt, cut after the end token; prompts are left-padded."""
    config = model.config
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new, **sampling)
    answers = []
    for row in out[:, width:].tolist():
        end = row.index(config.eos_token_id) + 1 if config.eos_token_id in row else len(row)
        answers.append(row[:end])
    return answers


def write_shard(path: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    rows = [np.asarray(p + a, dtype=np.uint16) for p, a in zip(prompts, answers, strict=True)]
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        tokens=np.concatenate(rows),
        lengths=np.asarray([len(r) for r in rows], dtype=np.int32),
        prompt_lengths=np.asarray([len(p) for p in prompts], dtype=np.int32),
    )
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=14_000)
    parser.add_argument("--sampled-share", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval()
    prompts = encode_prompts(args.corpus, "train", args.prompts)
    # Prompts of one length share a batch: little padding, and every shard is a fixed set of rows.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    shards = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    every = round(1 / args.sampled_share) if args.sampled_share else 0
    # In random order, so that whatever is there when somebody looks is a fair sample of lengths.
    numbers = np.random.default_rng(args.seed).permutation(len(shards))[rank::world]
    for number in tqdm(numbers.tolist(), desc="distilling", disable=rank > 0):
        path = args.out / f"shard-{number:05d}.npz"
        if path.exists():
            continue
        torch.manual_seed(args.seed * 1_000_003 + number)
        batch = [prompts[i] for i in shards[number]]
        temperature = 1.0 if every and number % every == every - 1 else 0.0
        write_shard(path, batch, complete(model, batch, temperature))


if __name__ == "__main__":
    main()
