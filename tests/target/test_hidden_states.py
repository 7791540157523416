"""Hooked states follow vLLM's numbering, whose last entry is taken before the final norm."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from vllm_specformer.target.hidden_states import HookedTarget

TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])


@torch.no_grad()
def test_inner_states_are_those_of_transformers(target_model: PreTrainedModel) -> None:
    expected = target_model(TOKENS, output_hidden_states=True).hidden_states
    states, _ = HookedTarget(target_model, range(5))(TOKENS)
    for layer, state in enumerate(states):
        assert torch.equal(state, expected[layer])
    assert torch.equal(states[0], target_model.get_input_embeddings()(TOKENS))


@torch.no_grad()
def test_last_state_is_not_normed(target_model: PreTrainedModel) -> None:
    expected = target_model(TOKENS, output_hidden_states=True).hidden_states[-1]
    (state,), last = HookedTarget(target_model, (5,))(TOKENS)
    assert not torch.allclose(state, expected)
    assert torch.equal(target_model.get_decoder().norm(state), expected)
    assert torch.equal(last, expected)


@torch.no_grad()
def test_order_is_the_order_asked_for(target_model: PreTrainedModel) -> None:
    target = HookedTarget(target_model, (4, 0))
    states, _ = target(TOKENS)
    assert torch.equal(states[1], target.embed(TOKENS))
    assert not torch.equal(states[0], states[1])


@torch.no_grad()
def test_logits_pass_through_norm_and_head(target_model: PreTrainedModel) -> None:
    target = HookedTarget(target_model, (5,))
    (state,), _ = target(TOKENS)
    torch.testing.assert_close(target.logits(state), target_model(TOKENS).logits)


def test_target_is_frozen_but_passes_gradients_on(target_model: PreTrainedModel) -> None:
    target = HookedTarget(target_model.train(), (0,))
    assert not target_model.training
    assert not any(p.requires_grad for p in target_model.parameters())
    states = torch.randn(2, 16, dtype=torch.double, requires_grad=True)
    target.logits(states).sum().backward()
    assert states.grad is not None
    assert states.grad.any()


@pytest.mark.parametrize("calls", [1, 3])
def test_states_do_not_pile_up(target_model: PreTrainedModel, calls: int) -> None:
    target = HookedTarget(target_model, (0, 5))
    for _ in range(calls):
        target(TOKENS)
    assert not target._states
