"""What is counted while vLLM answers, with a stand-in for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specformer.distill.dialogue import Request
from vllm_specformer.distill.offline import OfflineEngine
from vllm_specformer.distill.progress import ProgressBar


class StandIn:
    """vLLM's `LLM`: finishes an answer a step, the last first, of as many tokens as asked."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.llm_engine = self
        self.waiting: list[tuple[int, int]] = []
        self.added = 0
        self.on_step = on_step

    def enqueue(self, prompts: Sequence[Any], params: Sequence[Any], use_tqdm: bool) -> None:
        assert not use_tqdm
        for _, asked in zip(prompts, params, strict=True):
            self.waiting.append((self.added, asked["max_tokens"]))
            self.added += 1

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        self.on_step()
        number, length = self.waiting.pop()
        answer = SimpleNamespace(token_ids=[number] * length, finish_reason="length")
        unfinished = SimpleNamespace(finished=False)
        done = SimpleNamespace(finished=True, request_id=str(number), outputs=[answer])
        return [unfinished, done]


def test_the_speed_is_that_of_the_run_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a later batch, whose own speed begins anew; and without earlier runs."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    shown: list[str] = []
    bar = ProgressBar(total=100, done=60)
    monkeypatch.setattr(bar._bar, "set_postfix_str", lambda text, refresh: shown.append(text))

    def a_second() -> None:
        clock[0] += 1.0

    engine = object.__new__(OfflineEngine)
    engine._llm = StandIn(a_second)
    engine._sampling = dict
    lengths = (8, 16, 40)
    requests = [Request([1], 0.0, 1.0, length, None) for length in lengths]
    for batch in (0, 3):
        answers = engine._complete(requests, bar)
        assert [list(answer.token_ids) for answer in answers] == [
            [batch + place] * length for place, length in enumerate(lengths)
        ]
    assert bar._bar.n == 66
    bar.close()
    done = [40, 56, 64, 104, 120, 128]
    assert shown == [f"{tokens / second:,.0f} tokens/s" for second, tokens in enumerate(done, 1)]
