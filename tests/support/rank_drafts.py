"""A vLLM worker extension that remembers what the rank's proposer drafted, step by step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vllm_specformer.engine.proposer_v1 import SpecFormerProposer

# Of each step: the bonus tokens, and each request's drafts.
STEPS: list[tuple[list[int], list[list[int]]]] = []

_propose = SpecFormerProposer.propose


def _recording(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    drafts = _propose(self, *args, **kwargs)
    STEPS.append((kwargs["next_token_ids"].tolist(), drafts.tolist()))
    return drafts


SpecFormerProposer.propose = _recording  # type: ignore[method-assign]


class RankDrafts:
    def drafted(self) -> list[tuple[list[int], list[list[int]]]]:
        return STEPS
