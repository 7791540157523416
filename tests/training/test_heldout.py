"""Acceptance measured while training is the exact replay of each text by itself."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from support.plain_drafts import head_drafts
from support.training_texts import make_texts
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.acceptance import Acceptance
from vllm_specformer.training.heldout import Evaluation, evaluate, evaluation_budgets
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import Objective, PackedHead
from vllm_specformer.training.packing import Budget, collate, plan_all
from vllm_specformer.training.slot_loss import IGNORED
from vllm_specformer.training.texts import Texts

SLOTS = 5
KINDS = {
    "nested": {"markov_rank": 4, "num_slot_layers": 2},
    "whole": {"nested_slots": False, "draft_vocab_size": 2},
    "paper": {"slot_mask": "slots", "use_bonus_embedding": False, "nested_slots": False},
}


@pytest.fixture(params=sorted(KINDS))
def trained(request: pytest.FixtureRequest, target_model: PreTrainedModel) -> PackedHead:
    """A head that has seen the texts it is evaluated on, so that some drafts are accepted."""
    torch.manual_seed(1)
    fields = {"num_draft_slots": SLOTS} | KINDS[request.param]
    config = SpecFormerConfig.preset("default", target_model.config, "t", **fields)
    head = PackedHead(config).double()
    if head.draft_token_ids is not None:
        head.draft_token_ids.copy_(torch.tensor([1, 7]))  # half of the texts' tokens are 7
    target = HookedTarget(target_model, config.aux_hidden_state_layer_ids)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    rows = rows_of(target, repetitive())
    for step in range(40):
        slots = (2, 4, SLOTS)[step % 3] if config.nested_slots else SLOTS
        head(rows, target, slots, Objective((1.0,) * SLOTS))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.eval()


def repetitive() -> Texts:
    """Texts with few different tokens, which a toy head can learn."""
    texts = make_texts(6, 3)
    texts.tokens[::2] = 7
    return texts


def make_rows(target: HookedTarget, fields: dict[str, torch.Tensor]) -> HookedRows:
    states, last = target(fields["input_ids"], fields["position_ids"])
    return HookedRows(states, last, **fields)


def rows_of(target: HookedTarget, texts: Texts) -> HookedRows:
    batch = [list(range(len(texts)))]
    return make_rows(target, collate(texts, batch, None, None))


def test_replay_is_that_of_single_texts(trained: PackedHead, target_model: PreTrainedModel) -> None:
    target = HookedTarget(target_model, trained.config.aux_hidden_state_layer_ids)
    texts = repetitive()
    batches = [[[0, 1], [2, 3, 4]], [[5]]]
    result = evaluate(
        trained, target, texts, batches, lambda fields, _: make_rows(target, fields), memory=50_000
    )
    assert tuple(result.acceptance) == evaluation_budgets(SLOTS) == (4, 5)
    served = SpecFormerHead(trained.config).double()
    served.load_state_dict(trained.state_dict())
    for budget, acceptance in result.acceptance.items():
        expected = Acceptance(budget)
        for index in range(len(texts)):
            tokens = texts.input_ids(index).tolist()
            drafts = head_drafts(served, target, torch.tensor(tokens), budget).tolist()
            for start, end in texts.answers(index):
                expected.walk(tokens[:end], start, lambda position, d=drafts: d[position])
        assert acceptance == expected
        assert expected.accepted[1] > 0


def test_losses_are_those_of_training(trained: PackedHead, target_model: PreTrainedModel) -> None:
    target = HookedTarget(target_model, trained.config.aux_hidden_state_layer_ids)
    texts = repetitive()
    rows = rows_of(target, texts)
    _, per_slot = trained(rows, target, SLOTS, Objective((1.0,) * SLOTS))
    result = evaluate(
        trained,
        target,
        texts,
        plan_all(texts.lengths, Budget(50)),
        lambda fields, _: make_rows(target, fields),
    )
    torch.testing.assert_close(torch.tensor(result.slot_losses), per_slot, rtol=1e-4, atol=1e-5)
    labels = trained.to_indices(rows.labels(SLOTS), IGNORED)
    assert result.label_counts == (labels != IGNORED).sum((0, 1)).tolist()


def test_counts_add_up_over_processes() -> None:
    parts = []
    for start in (1, 3):
        part = Evaluation((1, 2))
        part.loss_sums, part.label_counts = [1.0, 2.0], [4.0, 0.0]
        for acceptance in part.acceptance.values():
            acceptance.walk([1, 2, 3, 4, 5, 6], start, lambda position: [position + 3] * 2)
        parts.append(part)
    total = Evaluation((1, 2))
    total.set_from(parts[0].to_tensor() + parts[1].to_tensor())
    for budget, acceptance in total.acceptance.items():
        both = [part.acceptance[budget] for part in parts]
        assert acceptance.steps == sum(a.steps for a in both) > 0
        assert acceptance.tokens == sum(a.tokens for a in both)
        assert acceptance.accepted[0] == sum(a.accepted[0] for a in both) > 0
    assert total.slot_losses[0] == 0.25
    assert math.isnan(total.slot_losses[1])


@pytest.mark.parametrize(("slots", "budgets"), [(1, (1,)), (4, (4,)), (8, (4, 8))])
def test_budgets(slots: int, budgets: tuple[int, ...]) -> None:
    assert evaluation_budgets(slots) == budgets
