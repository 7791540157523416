"""What a head costs to train, from shapes alone: parameters, memory, FLOPs, hours, disk.

    python benchmarks/training_cost.py                      # the table of docs/training.md

Heads are built without memory to count their parameters; FLOPs are two per weight and token of a
matrix product, four more for a backward pass through it (two more through frozen weights). The
divergence asks the target for its own logits too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.training.settings import MARKOV_RANK

# Layers, hidden size, query heads, feed-forward width, parameters in billions, tied embeddings:
# the models' published configurations. All: 8 K/V heads of 128, vocabulary 151,936.
TARGETS = {
    "Qwen3-4B": (36, 2560, 32, 9728, 4.0, True),
    "Qwen3-8B": (36, 4096, 32, 12288, 8.2, False),
    "Qwen3-14B": (40, 5120, 40, 17408, 14.8, False),
    "Qwen3-32B": (64, 5120, 64, 25600, 32.8, False),
}
VOCABULARY = 151_936
HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Plan:
    """How much is trained on; the defaults of `specformer train` where it has them."""

    texts: int
    text_tokens: int
    answer_tokens: int
    epochs: int
    anchors: int
    slots: int
    mean_slots: float  # run per anchor: 2, 4, 4 or 8 of 8
    memory_gib: float  # --memory


@dataclass(frozen=True)
class Cost:
    parameters: int
    memory_gib: float
    train_flops: float
    decode_bytes: float


def cost(name: str, plan: Plan) -> Cost:
    layers, hidden, heads, width, billions, tied = TARGETS[name]
    target = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, head_dim=128,
        num_attention_heads=heads, num_key_value_heads=8, intermediate_size=width,
        tie_word_embeddings=tied, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config = SpecFormerConfig.preset(
        "default", target, name, num_draft_slots=plan.slots, markov_rank=MARKOV_RANK
    )
    with torch.device("meta"):
        head = SpecFormerHead(config)
    sizes = {n: p.numel() for n, p in head.named_parameters()}
    parameters = sum(sizes.values())
    per_token = sum(n for name, n in sizes.items() if name.startswith(("fc", "context")))
    positional = sizes["positional_proj.weight"]
    looked_up = sizes["markov_embed.weight"]
    per_slot = parameters - per_token - looked_up - positional + positional / plan.slots
    slot_rows = plan.anchors * plan.mean_slots
    per_text = (
        plan.text_tokens * (2e9 * billions + 6 * per_token)
        + 6 * slot_rows * per_slot
        + 6 * slot_rows * hidden * VOCABULARY
    )
    # fp32 weights, gradients and one moment (Muon).
    states = 3 * SINGLE * parameters + HALF * 1e9 * billions
    return Cost(
        parameters=parameters,
        memory_gib=states / 2**30 + plan.memory_gib,
        train_flops=per_text * plan.texts * plan.epochs,
        decode_bytes=HALF * 1e9 * billions,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    plan = Plan(
        args.texts, args.text_tokens, args.answer_tokens, args.epochs, anchors=32, slots=8,
        mean_slots=4.5, memory_gib=2,
    )  # fmt: skip
    table = Table(
        "target", "head, M", "memory, GiB", "training, PFLOP", "training, GPU h",
        "answers, GPU h", "answers, GB",
    )  # fmt: skip
    tokens = plan.texts * plan.answer_tokens
    for name in TARGETS:
        found = cost(name, plan)
        step = found.decode_bytes / (args.bandwidth * 1e12 * args.decode_efficiency)
        table.add_row(
            name,
            f"{found.parameters / 1e6:,.0f}",
            f"{found.memory_gib:,.0f}",
            f"{found.train_flops / 1e15:,.0f}",
            f"{found.train_flops / (args.tflops * 1e12 * args.utilisation) / 3600:.1f}",
            f"{tokens / args.batch * step / 3600:.1f}",
            f"{plan.texts * plan.text_tokens * args.bytes_per_token / 1e9:.2f}",
        )
    Console(width=110).print(table)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--text-tokens", type=int, default=900, help="prompt and answer")
    parser.add_argument("--answer-tokens", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tflops", type=float, default=780, help="measured bf16 ceiling (H200)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of that, in training")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s, measured copy (H200)")
    parser.add_argument("--decode-efficiency", type=float, default=0.4, help="of that, decoding")
    parser.add_argument("--batch", type=int, default=256, help="answers decoded at a time")
    parser.add_argument("--bytes-per-token", type=float, default=2.2, help="on disk")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
