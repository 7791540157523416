"""`min_tokens` where drafts reach the minimum, and the refusal of `logprob_token_ids`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_specformer.engine.patches.requests import _validate_spec_decode, apply_logits_processors
from vllm_specformer.names import ARCHITECTURE

END, VOCABULARY = 3, 5
OURS = SimpleNamespace(
    draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=[ARCHITECTURE]))
)


class Minimum:
    """As vLLM's processor: (minimum, tokens so far, tokens that end the text) by row."""

    def __init__(self) -> None:
        self.min_toks = {row: (4, [7, 7], {END}) for row in range(3)}

    def apply(self, logits: Tensor) -> Tensor:
        logits[list(self.min_toks), END] = float("-inf")
        return logits


def original(self: Any, logits: Tensor, metadata: Any, predict_bonus_token: bool) -> Tensor:
    for processor in metadata.logitsprocs.non_argmax_invariant:
        logits = processor.apply(logits)
    return logits


def forbidden(predict_bonus_token: bool) -> list[bool]:
    """Rows that may not end, given drafts of one, two and no token."""
    minimum = Minimum()
    metadata = SimpleNamespace(
        spec_token_ids=[[1], [1, 2], []],
        logitsprocs=SimpleNamespace(non_argmax_invariant=[minimum]),
    )
    logits = apply_logits_processors(
        original, None, torch.zeros(3, VOCABULARY), metadata, predict_bonus_token
    )
    assert "apply" not in vars(minimum), "the processor stays changed"
    assert logits[:, :END].eq(0).all()
    return logits[:, END].isinf().tolist()


def test_a_bonus_token_may_end_the_text_where_drafts_reach_the_minimum() -> None:
    assert forbidden(predict_bonus_token=True) == [True, False, True]


def test_other_rows_are_judged_as_vllm_judges_them() -> None:
    assert forbidden(predict_bonus_token=False) == [True, True, True]


def test_logprob_token_ids_are_refused_beside_a_head() -> None:
    asking = SamplingParams(logprobs=1)
    asking.logprob_token_ids = [5]
    seen: list[Any] = []

    def validate(self: Any, config: Any) -> None:
        seen.append(config)

    with pytest.raises(VLLMValidationError, match=r"logprob_token_ids=\[5\] cannot be combined"):
        _validate_spec_decode(validate, asking, OURS)
    _validate_spec_decode(validate, asking, None)
    _validate_spec_decode(validate, SamplingParams(logprobs=1), OURS)
    assert seen == [OURS, None, OURS]
