"""Slot by slot is the same gradient as all at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vllm_specformer.head import SpecFormerHead
from vllm_specformer.training.hidden_states import HookedTarget
from vllm_specformer.training.objective import IGNORED, backward_slots, slot_labels

WEIGHTS = [1.0, 0.7, 0.2]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of two sequences, the second shorter; anchors up to where labels run out."""
    torch.manual_seed(2)
    tokens = torch.randint(40, (2, 9))
    return tokens, torch.tensor([9, 7]), torch.tensor([[0, 3, 5], [2, 4, 1]])


def test_labels_are_the_tokens_after_the_bonus_token() -> None:
    tokens = torch.arange(20).view(2, 10)
    labels = slot_labels(tokens, torch.tensor([[0, 7], [3, 8]]), 3, torch.tensor([10, 7]))
    assert labels.tolist() == [
        [[2, 3, 4], [9, IGNORED, IGNORED]],
        [[15, 16, IGNORED], [IGNORED] * 3],
    ]


def test_gradients_equal_one_backward_pass(
    head: SpecFormerHead, target_model: PreTrainedModel
) -> None:
    target = HookedTarget(target_model, head.config.aux_hidden_state_layer_ids)
    tokens, lengths, anchors = batch()
    states, _ = target(tokens)
    bonus = tokens.gather(1, anchors + 1)
    labels = slot_labels(tokens, anchors, 3, lengths)
    assert (labels == IGNORED).any()

    losses = backward_slots(
        head, target, head(states, anchors, target.embed(bonus)), bonus, labels, WEIGHTS
    )
    got = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()

    logits = target.logits(head(states, anchors, target.embed(bonus)))
    if head.config.markov_rank:
        before = torch.cat([bonus[..., None], labels[..., :-1].clamp(min=0)], dim=-1)
        logits = logits + head.markov_logits(before)
    per_slot = [
        F.cross_entropy(logits[:, :, i].flatten(0, 1), labels[:, :, i].flatten(),
                        ignore_index=IGNORED)
        for i in range(3)
    ]  # fmt: skip
    sum(w / sum(WEIGHTS) * loss for w, loss in zip(WEIGHTS, per_slot, strict=True)).backward()

    torch.testing.assert_close(torch.tensor(losses), torch.stack(per_slot).detach().float())
    assert got.keys() == {name for name, _ in head.named_parameters()}
    for name, parameter in head.named_parameters():
        # Losses are taken in float32, as in training, so gradients agree to its precision.
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert got[name].any(), name


def test_target_receives_no_gradient(head: SpecFormerHead, target_model: PreTrainedModel) -> None:
    target = HookedTarget(target_model, head.config.aux_hidden_state_layer_ids)
    tokens, lengths, anchors = batch()
    states, _ = target(tokens)
    bonus = tokens.gather(1, anchors + 1)
    slots = head(states, anchors, target.embed(bonus))
    backward_slots(head, target, slots, bonus, slot_labels(tokens, anchors, 3, lengths), WEIGHTS)
    assert all(p.grad is None for p in target_model.parameters())


def test_only_weighted_slots_count(head: SpecFormerHead, target_model: PreTrainedModel) -> None:
    """A slot of weight zero leaves no gradient in its part of the positional projection."""
    target = HookedTarget(target_model, head.config.aux_hidden_state_layer_ids)
    tokens, lengths, anchors = batch()
    states, _ = target(tokens)
    bonus = tokens.gather(1, anchors + 1)
    slots = head(states, anchors, target.embed(bonus))
    with torch.no_grad():
        head.slot_attn.o_proj.weight.zero_()  # otherwise slots reach each other by attention
    slots = head(states, anchors, target.embed(bonus))
    labels = slot_labels(tokens, anchors, 3, lengths)
    backward_slots(head, target, slots, bonus, labels, [1.0, 0.0, 1.0])
    grad = head.positional_proj.weight.grad
    assert grad is not None
    used = [bool(part.any()) for part in grad.view(3, 16, -1)]
    assert used == [True, False, True]
