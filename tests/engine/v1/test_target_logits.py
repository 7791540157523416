"""The logits of a draft vocabulary are the target's own, whatever its lm_head is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_specformer.engine.target_logits import logits_of_some

SIZE, VOCAB, PADDED = 32, 40, 64
SCORED = torch.tensor([1, 7, 8, 30, 39])


class Quantised:
    """A method that is not vLLM's plain one; the product itself does not matter here."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ layer.weight.T


class Target:
    """The end of a target: lm_head, vLLM's logits processor, and a count of whole products."""

    def __init__(self, dtype: torch.dtype = torch.float32, **processing: Any) -> None:
        torch.manual_seed(0)
        weight = torch.randn(PADDED, SIZE).to(dtype)
        method = UnquantizedEmbeddingMethod()
        self.embedding = SimpleNamespace(weight=weight, bias=None, tp_size=1, quant_method=method)
        method.process_weights_after_loading(self.embedding)
        self.bias = processing.pop("bias", None)
        with set_current_vllm_config(VllmConfig()):
            self.logits_processor = LogitsProcessor(VOCAB, **processing)
        self.whole_products = 0

    def compute_logits(self, states: Tensor) -> Tensor:
        self.whole_products += 1
        lm_head = getattr(self, "lm_head", self.embedding)
        return self.logits_processor(lm_head, states, self.bias)


def scaled_again(target: Target) -> None:
    whole = target.compute_logits
    target.compute_logits = lambda states: 1.1 * whole(states)  # type: ignore[method-assign]


def biased(target: Target) -> None:
    target.bias = target.embedding.bias = torch.randn(PADDED)


def unknown_bias(target: Target) -> None:
    target.bias = torch.randn(PADDED)


def quantised(target: Target) -> None:
    target.embedding.quant_method = Quantised()


def other_processor(target: Target) -> None:
    target.logits_processor = lambda head, states, bias: head.quant_method.apply(head, states)


def given_away(target: Target) -> None:
    """As vLLM leaves a weight that it has packed; the packed form gives the logits."""
    target.embedding.weight = torch.empty(0)


def separate(target: Target) -> None:
    target.lm_head, target.embedding = target.embedding, SimpleNamespace()


CASES: dict[str, tuple[dict[str, Any], Callable[[Target], None] | None, bool]] = {
    "plain": ({}, None, True),
    "scaled": ({"scale": 0.25}, None, True),
    "capped": ({"soft_cap": 3.0}, None, True),
    "bfloat16": ({"dtype": torch.bfloat16, "soft_cap": 3.0, "scale": 2.0}, None, True),
    "biased": ({}, biased, True),
    "own lm_head": ({}, separate, True),
    "scaled by the target itself": ({}, scaled_again, False),
    "bias from elsewhere": ({}, unknown_bias, False),
    "quantised": ({}, quantised, False),
    "other processor": ({}, other_processor, False),
    "given away": ({}, given_away, False),
    "tensor parallel": ({}, lambda target: setattr(target.embedding, "tp_size", 2), False),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_targets(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the whole product is spared where it can be."""
    processing, change, spared = CASES[case]
    target = Target(**processing)
    if case == "tensor parallel":  # as if one rank's logits were all
        monkeypatch.setattr(target.logits_processor, "_gather_logits", lambda logits: logits)
    if change is not None:
        change(target)
    like = torch.empty(SIZE, dtype=processing.get("dtype", torch.float32))
    some = logits_of_some(target, target.embedding, target.compute_logits, SCORED, like)
    before = target.whole_products
    states = torch.randn(6, SIZE).to(like)
    found = some(states)
    assert (target.whole_products == before) is spared
    expected = target.compute_logits(states)[:, SCORED]
    assert found.dtype == expected.dtype
    # The same products, summed in another order.
    tolerance = 2e-2 if like.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-5)
