"""What CUDA does and a CPU does not, put on engines of the tests.

A CPU's norms write to new memory, its one attention backend takes blocks of any size, it reads a
step's output before it starts the next, it replays nothing, and what nobody has written reads as
zeros. A GPU is less kind in all of these. Each personality takes one of its manners on, for engines
that are started under it.
"""

from __future__ import annotations

import math
from collections import Counter
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
NAMES = ("in-place", *SPLIT, "asynchronous", "replayed")
# Not one of these: what a target computes from an fp8 cache is not what the dense one computes.
# `test_other_caches.py` compares drafts on the states that were handed out.
FP8 = "fp8"


@contextmanager
def personality(name: str) -> Iterator[dict[str, Any]]:
    """Take a personality on; gives what engines under it are started with."""
    if name == "in-place":
        register_in_place_norm()
        yield {"kernel_config": {"ir_op_priority": {"fused_add_rms_norm": ["in_place"]}}}
        return
    if name == FP8:
        yield {"kv_cache_dtype": "fp8_e4m3"}
        return
    if name == "asynchronous":
        with asynchronous():
            yield {"async_scheduling": True}
        return
    if name == "replayed":
        with replayed():
            yield {}
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    def sizes(kv_cache_spec: Any = None) -> list[int]:
        return [SPLIT[name]]

    with mock.patch.object(
        CPUAttentionBackend, "get_supported_kernel_block_sizes", staticmethod(sizes)
    ):
        yield {"block_size": BLOCK}


@contextmanager
def asynchronous() -> Iterator[None]:
    """Let engines plan and start a step before they read what the one before it has sampled."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def keeping_order(cls: Any, vllm_config: Any) -> None:
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True  # which a CPU does not ask for

    with mock.patch.object(CpuPlatform, "check_and_update_config", classmethod(keeping_order)):
        yield


@contextmanager
def counting_overlaps() -> Iterator[Counter[str]]:
    """Counts the V2 runner's steps: `drafted`, `read`, and `overlapped`, drafted before the output
    of the step before was read."""
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

    counts: Counter[str] = Counter()
    propose, get_output = SpecFormerSpeculator.propose, AsyncOutput.get_output

    def proposing(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        counts["overlapped"] += counts["drafted"] > counts["read"]
        counts["drafted"] += 1
        return propose(self, *args, **kwargs)

    def reading(self: Any) -> Any:
        counts["read"] += 1
        return get_output(self)

    with (
        mock.patch.object(SpecFormerSpeculator, "propose", proposing),
        mock.patch.object(AsyncOutput, "get_output", reading),
    ):
        yield counts


class Replays:
    """Stands in for captured graphs of all sizes that are a multiple of `PADDED`, and the largest.

    A graph runs what was captured: the context rows of a full batch and the draft pass over all
    its rows, on whatever the buffers hold. It is the captured functions themselves, so this shows
    everything about a replay but that CUDA can record it.
    """

    PADDED = 4

    def __init__(self, ours: Any) -> None:
        self.ours = ours
        self.replays = Counter[tuple[int, int]]()  # by requests and rows
        self._dispatched = 0

    def dispatch(self, manager: Any, requests: int, num_rows: int, **kwargs: Any) -> Any:
        """In place of vLLM's `dispatch_cg_and_sync_dp`."""
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        assert manager is self
        assert num_rows == requests
        assert kwargs["uniform_token_count"] == 1
        padded = min(-(-requests // self.PADDED) * self.PADDED, self.ours.max_num_reqs)
        self._dispatched = requests
        return BatchExecutionDescriptor(CUDAGraphMode.FULL, padded, padded), None

    def run_fullgraph(self, desc: Any) -> None:
        self.replays[self._dispatched, desc.num_reqs] += 1
        self.ours._prepare_graph_forward(desc.num_reqs)
        self.ours._generate_draft(desc.num_reqs, desc.num_reqs)


@contextmanager
def replayed() -> Iterator[None]:
    """Let V2 speculators take every step by a graph."""
    from vllm_specformer.engine import speculator_v2
    from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

    def with_graphs(self: Any, cudagraph_mode: Any) -> None:
        self._graph_drafts.clear()
        self.query_cudagraph_manager = Replays(self)

    def dispatch(manager: Any, *args: Any, **kwargs: Any) -> Any:
        return manager.dispatch(manager, *args, **kwargs)

    with (
        mock.patch.object(SpecFormerSpeculator, "init_cudagraph_manager", with_graphs),
        mock.patch.object(speculator_v2, "dispatch_cg_and_sync_dp", dispatch),
    ):
        yield


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
        # Rows that pad a batch read whatever block their row of the table was left with. That does
        # no harm, but the interpreter takes NaN throughout for an error: let it be the null block.
        self._block_table[requests:].zero_()
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
