"""Targets of every family with heads that `specformer train` made for them in 50 steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from support.family_targets import make_target
from support.training_texts import write_distilled
from vllm_specformer.cli.main import main
from vllm_specformer.training.texts import Text, Texts

STEPS = 50
NUM_TEXTS, NEW_TOKENS = 64, 40
# The longest reaches past every sliding window, and past the lengths that scaled RoPE begins with.
PROMPT_LENGTHS = (6, 17, 90)


@dataclass(frozen=True)
class Pair:
    target: Path
    head: Path
    prompts: tuple[tuple[int, ...], ...]


def make_pair(folder: Path, family: str) -> Pair:
    """Build the target, let it answer random prompts, train a head on the answers."""
    pair = Pair(folder / "target", folder / "head", _prompts(family))
    model = make_target(family)
    model.save_pretrained(pair.target)
    made, random = [], torch.Generator().manual_seed(1)
    for index in range(NUM_TEXTS):
        prompt = torch.randint(300, (1, 8), generator=random)
        if index % 16 == 0:
            prompt = torch.randint(300, (16, 8), generator=random)
            answers = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens = answers[index % 16].numpy().astype(np.int32)
        made.append(Text(index, tokens, ((8, len(tokens)),), 0.0))
    data = folder / "data"
    write_distilled(data, Texts.collect(made, 8 + NEW_TOKENS), pair.target)
    arguments = ["--target", pair.target, "--data", data, "--out", pair.head]
    arguments += ["--slots", 4, "--max-steps", STEPS, "--batch-tokens", 512, "--eval-every", STEPS]
    # Its term is added to the logits, so their scale and cap decide about drafts.
    arguments += ["--markov-rank", 8, "--dtype", "float32", "--anchors-per-text", 32]
    assert main(["train", *map(str, arguments)]) == 0
    return pair


def _prompts(family: str) -> tuple[tuple[int, ...], ...]:
    random = torch.Generator().manual_seed(2)
    lengths = PROMPT_LENGTHS * 4
    return tuple(tuple(torch.randint(300, (n,), generator=random).tolist()) for n in lengths)
