"""Greedy continuations of many prompts at a time."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

BATCH = 128  # prompts


@torch.inference_mode()
def complete(model: PreTrainedModel, prompts: list[list[int]], max_new: int) -> list[list[int]]:
    """Continuations without the prompt, cut after the end token; prompts are left-padded."""
    config = model.config
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False)
    answers = []
    for row in out[:, width:].tolist():
        end = row.index(config.eos_token_id) + 1 if config.eos_token_id in row else len(row)
        answers.append(row[:end])
    return answers
