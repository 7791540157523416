"""Writes the targets and heads of `shapes` into directories that vLLM can open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpu_stages.shapes import OTHERS, SCORED_TOKENS, TargetShape

SLOTS = 8
STD = 0.02


def write_target(folder: Path, target: TargetShape) -> Path:
    """A directory with the target's `config.json` and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(target.config(), indent=2) + "\n")
    return folder


def write_head(folder: Path, kind: str, target: TargetShape, target_path: Path) -> dict[str, Any]:
    """A head of random weights, made once; the speculative config that serves it.

    `kind` is `specformer` (as `specformer train` makes it), `specformer-32k` (with a draft
    vocabulary as large as EAGLE-3's), or a name of `OTHERS`.
    """
    if kind.startswith("specformer"):
        speculative = {"method": "specformer"}
        if not (folder / "config.json").is_file():
            _write_specformer(folder, target, target_path, pruned=kind != "specformer")
    else:
        head = OTHERS[kind](target)
        speculative = head.speculative
        if not (folder / "config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {n: _random(n, shape, target) for n, shape in head.tensors.items()}
            save_file(tensors, folder / "model.safetensors")
            # Last, so that a directory with a config is a whole checkpoint.
            (folder / "config.json").write_text(json.dumps(head.config, indent=2) + "\n")
    # The target's weights are dummies, the head's are in its file.
    return speculative | {"model": str(folder), "draft_load_config": {"load_format": "auto"}}


def _random(name: str, shape: tuple[int, ...], target: TargetShape) -> Tensor:
    if name == "d2t":  # offsets from scored to target ids
        ids = torch.arange(shape[0])
        return ids * (target.vocab_size // shape[0]) - ids
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=STD).cpu()


def _write_specformer(folder: Path, target: TargetShape, target_path: Path, pruned: bool) -> None:
    from transformers import AutoConfig

    from vllm_specformer.config import SpecFormerConfig
    from vllm_specformer.head import SpecFormerHead
    from vllm_specformer.shapes import MARKOV_RANK

    scored = min(SCORED_TOKENS, target.vocab_size // 2) if pruned else 0
    config = SpecFormerConfig.preset(
        "default",
        AutoConfig.from_pretrained(target_path),
        str(target_path),
        num_draft_slots=SLOTS,
        draft_vocab_size=scored,
        markov_rank=MARKOV_RANK,  # as `specformer train` makes it
        markov_gate=True,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        head = SpecFormerHead(config)
    head.to(dtype=torch.bfloat16, device="cpu").save_pretrained(folder)
