"""LoRA adapters for the bundled target, made of noise."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from support.paths import TARGET

RANK = 8
STRENGTH = 0.14
# What vLLM must be told to take them.
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}


def make_adapter(directory: Path, seed: int, with_head: bool = True) -> Path:
    """An adapter of queries, values and lm_head, strong enough to change what the target says."""
    config = AutoConfig.from_pretrained(TARGET)
    hidden, head = config.hidden_size, config.head_dim
    outputs = {
        f"model.layers.{layer}.self_attn.{name}": heads * head
        for layer in range(config.num_hidden_layers)
        for name, heads in (
            ("q_proj", config.num_attention_heads),
            ("v_proj", config.num_key_value_heads),
        )
    }
    if with_head:
        outputs["lm_head"] = config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, rows in outputs.items():
        for part, shape in (("A", (RANK, hidden)), ("B", (rows, RANK))):
            noise = torch.randn(shape, generator=generator)
            weights[f"base_model.model.{name}.lora_{part}.weight"] = noise * STRENGTH
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[-1] for name in outputs})
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(about))
    return directory
