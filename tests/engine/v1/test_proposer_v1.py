"""What V1's proposer does by itself, before it drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from support.engines import drafting, engine, greedy, prompts
from vllm_specformer.engine.draws.batch_v1 import DrawnBatch


def test_class_is_judged_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proposer is built before the target's weights are read, so its check comes in time."""
    from vllm_specformer.engine import proposer_v1

    config = SimpleNamespace(model_config="the target's")
    monkeypatch.setattr(
        proposer_v1,
        "check_target_class",
        lambda c: (_ for _ in ()).throw(LookupError(c.model_config)),
    )
    with pytest.raises(LookupError, match="the target's"):
        proposer_v1.SpecFormerProposer.__init__(
            object.__new__(proposer_v1.SpecFormerProposer), config, torch.device("cpu")
        )


def test_greedy_batches_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default drafts are drawn, but no probability is computed where nobody wants them."""
    draws: list[int] = []
    draw = DrawnBatch.draw

    def counted(self: DrawnBatch, logits: Any, *args: Any) -> Any:
        draws.append(len(logits))
        return draw(self, logits, *args)

    monkeypatch.setattr(DrawnBatch, "draw", counted)
    best = SamplingParams(temperature=1, top_k=1, max_tokens=8)
    with engine(drafting(4)) as llm:
        for params in ([greedy(8)] * 3, [greedy(8), best, best]):
            llm.generate(list(prompts()[:3]), params, use_tqdm=False)
            assert draws == []
        sampled = SamplingParams(temperature=1, max_tokens=8)
        llm.generate(list(prompts()[:3]), [greedy(8), best, sampled], use_tqdm=False)
        assert draws
    draws.clear()
    with engine(drafting(4, draft_sample_method="greedy")) as llm:
        llm.generate(list(prompts()[:3]), sampled, use_tqdm=False)
    assert draws == []
