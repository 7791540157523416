"""The shapes that targets were published with, as far as their KV caches depend on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Pages = tuple[int, int, int, int]  # layers, K/V heads, head size, sliding window (0: none)


@dataclass(frozen=True)
class Target:
    """A published target, and the K/V heads and head size of its head.

    `mla` counts layers with 512 + 64 latent values; `mamba` are layers, their conv state's width,
    heads, and sizes of a head's state.
    """

    name: str
    head: tuple[int, int]
    attention: tuple[Pages, ...] = ()
    mla: int = 0
    mamba: tuple[int, int, int, int, int] | None = None
    state_dtype: torch.dtype = torch.bfloat16


def gated_delta_net(layers: int, value_heads: int) -> tuple[int, int, int, int, int]:
    return layers, 2 * 16 * 128 + value_heads * 128, value_heads, 128, 128


TARGETS = (
    Target("Llama 3.1 8B", (8, 128), ((32, 8, 128, 0),)),
    Target("Llama 3.1 70B", (8, 128), ((80, 8, 128, 0),)),
    Target("Qwen3 8B", (8, 128), ((36, 8, 128, 0),)),
    Target("Qwen3 32B", (8, 128), ((64, 8, 128, 0),)),
    Target("Qwen3-30B-A3B", (4, 128), ((48, 4, 128, 0),)),
    Target("Qwen3-Next-80B-A3B", (2, 256), ((12, 2, 256, 0),), mamba=gated_delta_net(36, 32)),
    Target("Qwen3.5-27B", (4, 256), ((16, 4, 256, 0),), mamba=gated_delta_net(48, 48)),
    Target("Qwen3.5-35B-A3B", (2, 256), ((10, 2, 256, 0),), mamba=gated_delta_net(30, 32)),
    Target("Gemma 4 31B", (16, 256), ((50, 16, 256, 1024), (10, 4, 512, 0))),
    Target("Gemma 4 26B-A4B", (8, 256), ((25, 8, 256, 1024), (5, 2, 512, 0))),
    Target("gpt-oss-20b", (8, 64), ((12, 8, 64, 128), (12, 8, 64, 0))),
    Target("gpt-oss-120b", (8, 64), ((18, 8, 64, 128), (18, 8, 64, 0))),
    Target("Nemotron-H-8B", (8, 128), ((4, 8, 128, 0),), mamba=(24, 10240, 128, 64, 128)),
    Target("Nemotron-H-56B", (8, 128), ((10, 8, 128, 0),), mamba=(54, 20480, 256, 64, 256)),
    Target(
        "Kimi-Linear-48B-A3B",
        (32, 72),
        mla=7,
        mamba=(20, 3 * 4096, 32, 128, 128),
        state_dtype=torch.float32,
    ),
    Target("DeepSeek-V3", (128, 64), mla=61),
)
