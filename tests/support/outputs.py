"""What engines have answered, and what they have counted meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vllm import LLM, RequestOutput

Tokens = tuple[int, ...]


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
