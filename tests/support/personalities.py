"""What CUDA does and a CPU does not, put on engines of the tests.

A CPU's norms write to new memory, its one attention backend takes blocks of any size, and what
nobody has written reads as zeros. A GPU is less kind in all three. Each personality takes one of
its manners on, for engines that are started under it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# A page and a slot that no cache of the tests has.
NOWHERE = 10**6
BLOCK = 64
# Kernel block sizes of a target's backend by personality; its blocks have 64 tokens.
SPLIT = {"pages-of-32": 32, "pages-of-16": 16}
NAMES = ("in-place", *SPLIT)


@contextmanager
def personality(name: str) -> Iterator[dict[str, Any]]:
    """Take a personality on; gives what engines under it are started with."""
    if name == "in-place":
        register_in_place_norm()
        yield {"kernel_config": {"ir_op_priority": {"fused_add_rms_norm": ["in_place"]}}}
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    def sizes(kv_cache_spec: Any = None) -> list[int]:
        return [SPLIT[name]]

    with mock.patch.object(
        CPUAttentionBackend, "get_supported_kernel_block_sizes", staticmethod(sizes)
    ):
        yield {"block_size": BLOCK}


@cache
def register_in_place_norm() -> None:
    """Tell vLLM's IR of a norm that works as CUDA's: it overwrites both of its inputs."""
    from vllm.ir.ops import fused_add_rms_norm

    native = fused_add_rms_norm.impls["native"].impl_fn

    @fused_add_rms_norm.register_impl("in_place", supported=True, inplace=True)
    def in_place(
        x: Tensor,
        x_residual: Tensor,
        weight: Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        normed, total = native(x, x_residual, weight, epsilon, variance_size)
        return x.copy_(normed), x_residual.copy_(total)


@contextmanager
def poisoned(llm: Any) -> Iterator[None]:
    """Leave nothing usable between the V2 speculator's steps but what a step may rely on.

    Before a step: its part of every staged buffer, entries of the block table past a request's own
    blocks, and the drafts of the step before. After it: the hooked states. At the beginning: every
    page of the head's cache but vLLM's null block.
    """
    from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

    original = SpecFormerSpeculator.propose

    def propose(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        requests, tokens = batch.num_reqs, batch.num_tokens
        self.hidden_states.fill_(math.nan)
        self.draft_tokens.fill_(-1)
        for name in ("anchor_rows", "anchor_positions", "bonus_tokens"):
            getattr(self.inputs, name)[:requests] = NOWHERE
        self.inputs.context_lens[:requests] = NOWHERE
        self.inputs.slot_mapping[:tokens] = self.inputs.context_positions[:tokens] = NOWHERE
        samples = requests * self.num_speculative_steps
        self.inputs.sample_pos[:samples] = self.inputs.sample_idx_mapping[:samples] = NOWHERE
        owned = self.block_tables.num_blocks.np[self.group]
        for row, state in enumerate(batch.idx_mapping[:requests].tolist()):
            self._block_table[row, owned[state] :] = NOWHERE
        drafts = original(self, batch, *args, **kwargs)
        for state in args[3]:
            state.fill_(math.nan)
        return drafts

    core = llm.llm_engine.engine_core.engine_core
    ours = core.model_executor.driver_worker.worker.model_runner.speculator
    for layer in ours.model.attn.layers:  # rows that pad a batch read the null block
        layer.kv_cache[ours.model.attn.pages_per_block :] = math.nan
    with torch.inference_mode(), mock.patch.object(SpecFormerSpeculator, "propose", propose):
        yield
