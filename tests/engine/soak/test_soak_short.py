"""300 requests at once on an engine whose KV cache is too small for them, V1 runner."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from vllm import LLM, SamplingParams

from support.engines import Job, drafting, engine, run_plain
from support.outputs import Tokens, counting, token_ids
from support.traffic import Ask, stock, traffic

REQUESTS = 300
AT_ONCE = 40
# 24 blocks of 32 tokens for 16 sequences of up to 300 tokens: vLLM preempts all the time.
SMALL = {
    "block_size": 32,
    "num_gpu_blocks_override": 24,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "max_model_len": 384,
    "scheduling_policy": "priority",
}
# Live tensors, not resident memory: vLLM's and PyTorch's allocators take 200 MB in the first 500
# requests with or without speculation. One request's hooked states (4 KB a token) would show.
MAX_GROWTH_KB = 256
STUCK_AFTER_STEPS = 20_000


@dataclass
class Client:
    """Submits requests, keeps `AT_ONCE` of them going, goes away from some in between."""

    llm: LLM
    going: dict[str, Ask] = field(default_factory=dict)
    answers: dict[str, tuple[Ask, Tokens]] = field(default_factory=dict)
    left: dict[str, tuple[Ask, Tokens]] = field(default_factory=dict)

    def run(self, asks: list[Ask]) -> None:
        waiting = list(enumerate(asks))[::-1]
        for _ in range(STUCK_AFTER_STEPS):
            while waiting and len(self.going) < AT_ONCE:
                number, ask = waiting.pop()
                self._submit(f"soak-{number}", ask)
            if not self.going:
                return
            self._step()
        pytest.fail(f"{len(self.going)} requests never ended")

    def _submit(self, name: str, ask: Ask) -> None:
        self.llm.llm_engine.add_request(
            name, ask.prompt, SamplingParams(**ask.settings), priority=ask.priority
        )
        self.going[name] = ask

    def _step(self) -> None:
        for output in self.llm.llm_engine.step():
            ask, tokens = self.going[output.request_id], tuple(output.outputs[0].token_ids)
            if output.finished:
                self.answers[output.request_id] = (self.going.pop(output.request_id), tokens)
            elif ask.leaves_after is not None and len(tokens) > ask.leaves_after:
                self.left[output.request_id] = (self.going.pop(output.request_id), tokens)
                self.llm.llm_engine.abort_request([output.request_id])


def tensor_kb() -> float:
    """Memory of all tensors that something still refers to, shared storages counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 1024


def free_blocks(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def test_soak() -> None:
    known = stock()
    job = Job([g.prompt for g in known], [SamplingParams(**g.settings) for g in known])
    expected = [ids for (ids,) in token_ids(run_plain({"stock": job}, max_model_len=384)["stock"])]
    asks = list(itertools.islice(traffic(0, known), REQUESTS))
    with engine(drafting(4), **SMALL) as llm:
        Client(llm).run(asks[:AT_ONCE])
        client, before, tensors = Client(llm), free_blocks(llm), tensor_kb()
        with counting(llm) as counted:
            client.run(asks)
        assert free_blocks(llm) == before, "blocks of ended requests are free again"
        assert tensor_kb() < tensors + MAX_GROWTH_KB
        assert token_ids(Job(job.prompts[:8], job.params[:8]).run(llm)) == [
            [tokens] for tokens in expected[:8]
        ]
    assert len(client.answers) + len(client.left) == REQUESTS
    for ask, tokens in client.answers.values():
        assert ask.known is None or tokens == expected[ask.known]
    for ask, tokens in client.left.values():
        assert ask.known is None or tokens == expected[ask.known][: len(tokens)]
    kinds = Counter(ask.known is None for ask, _ in client.answers.values())
    assert min(kinds.values()) >= 60
    assert len(client.left) >= 10
    assert counted["num_preemptions"] >= 20
    assert counted["prefix_cache_hits"] > 0
    assert counted["spec_decode_num_accepted_tokens"] > 500
