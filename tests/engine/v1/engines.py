"""Engines for the tests: start, run jobs, shut down; and a dense reference of target and head."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget

ROOT = Path(__file__).parents[3]
TARGET = ROOT / "examples" / "models" / "python-target"
HEAD = ROOT / "examples" / "models" / "python-specformer"
PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"

Tokens = tuple[int, ...]


@cache
def prompts() -> tuple[str, ...]:
    """Beginnings of Python functions that are in no part of the target's training."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["prompt"] for line in lines)


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **changes)


def drafting(num_tokens: int | None = 4, head: Path = HEAD, **changes: Any) -> dict[str, Any]:
    """A speculative config for `head`."""
    config = {"method": "specformer", "model": str(head), **changes}
    return config if num_tokens is None else config | {"num_speculative_tokens": num_tokens}


@contextmanager
def engine(speculative: dict[str, Any] | None = None, **changes: Any) -> Iterator[LLM]:
    """An eager fp32 engine in this process, gone without trace afterwards.

    fp32 makes token ids and drafts comparable exactly; a fixed cache size keeps vLLM from judging
    the machine's free memory.
    """
    arguments: dict[str, Any] = {
        "model": str(TARGET),
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 256 << 20,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(**(arguments | {"speculative_config": speculative} | changes))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


@dataclass
class Job:
    """Prompts that are submitted together, each with its own sampling parameters."""

    prompts: Sequence[str]
    params: SamplingParams | Sequence[SamplingParams]

    def run(self, llm: LLM) -> list[RequestOutput]:
        params = self.params if isinstance(self.params, SamplingParams) else list(self.params)
        return llm.generate(list(self.prompts), params, use_tqdm=False)


def run_plain(jobs: dict[str, Job], **changes: Any) -> dict[str, list[RequestOutput]]:
    """What an engine without speculation answers to each job."""
    with engine(None, **changes) as llm:
        return {name: job.run(llm) for name, job in jobs.items()}


def token_ids(outputs: Sequence[RequestOutput]) -> list[list[Tokens]]:
    """Token ids of every completion of every request."""
    return [[tuple(c.token_ids) for c in output.outputs] for output in outputs]


def continuations(outputs: Sequence[RequestOutput]) -> dict[Tokens, Tokens]:
    """Prompt tokens -> the first completion's tokens."""
    return {tuple(o.prompt_token_ids or ()): tuple(o.outputs[0].token_ids) for o in outputs}


def counters(llm: LLM) -> dict[str, int]:
    """vLLM's counters by name without the prefix `vllm:`."""
    return {
        metric.name.removeprefix("vllm:"): metric.value
        for metric in llm.get_metrics()
        if hasattr(metric, "value") and isinstance(metric.value, int)
    }


@dataclass
class Counted:
    """Increase of vLLM's counters inside a `with counting(llm)` block."""

    values: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    @property
    def tokens_per_step(self) -> float:
        drafts = self["spec_decode_num_drafts"]
        return 1 + self["spec_decode_num_accepted_tokens"] / max(1, drafts)


@contextmanager
def counting(llm: LLM) -> Iterator[Counted]:
    counted, before = Counted(), counters(llm)
    yield counted
    counted.values = {name: value - before[name] for name, value in counters(llm).items()}


class DenseReference:
    """Target and head in plain PyTorch, fp32: what the engine's drafts must be."""

    def __init__(self, head: Path = HEAD, target: Path = TARGET) -> None:
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self.head = SpecFormerHead.from_pretrained(head, dtype=torch.float32).eval()
        self.target = HookedTarget(model, self.head.config.aux_hidden_state_layer_ids)

    @torch.no_grad()
    def slot_logits(
        self, text: Sequence[int], anchors: Sequence[int], num_tokens: int | None = None
    ) -> torch.Tensor:
        """Logits of the slots at the given positions of `text`, without the Markov term.

        With `num_tokens` as a pass that drafts so many, which may open fewer slots.
        """
        wanted = num_tokens or self.head.config.num_draft_slots
        ids = torch.tensor([list(text)])
        where = torch.tensor([list(anchors)])
        states, _ = self.target(ids)
        bonus = self.target.embed(ids[0, where + 1])
        slots = self.head(states, where, bonus, self.head.slots_to_run(wanted))
        return self.target.logits(slots)[0]

    @torch.no_grad()
    def biased(self, logits: torch.Tensor, previous: int) -> torch.Tensor:
        """One slot's logits [V] given the token before it; -inf for tokens it does not score."""
        logits = self.head.scored(logits)
        if self.head.config.markov_rank:
            logits = logits + self.head.markov_logits(torch.tensor(previous))
        return self.head.over_vocabulary(logits[None], float("-inf"))[0]


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TARGET)


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
