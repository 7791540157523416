"""Heads with random weights for the bundled target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from support.paths import TARGET
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead


def make_head(directory: Path, preset: str, **changes: Any) -> Path:
    """Save a head for TARGET with random weights, large in its attentions.

    Its drafts hang on the context much more than a freshly initialised head's would, so a wrong
    cache entry shows. A draft vocabulary holds tokens drawn from the whole.
    """
    torch.manual_seed(0)
    target = AutoConfig.from_pretrained(TARGET)
    head = SpecFormerHead(SpecFormerConfig.preset(preset, target, str(TARGET), **changes))
    for name, parameter in head.named_parameters():
        if "_attn." in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "markov" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if head.draft_token_ids is not None:
        drawn = torch.randperm(target.vocab_size)[: len(head.draft_token_ids)]
        head.draft_token_ids.copy_(drawn.sort().values)
    head.save_pretrained(directory)
    return directory
