"""`LeaningHead`: its loss is that of the head that is saved, and its gradients are the tables'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from support.toy_heads import SCORED, random_head, rows_of
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.leaning_head import LeaningHead
from vllm_specformer.training.packed_head import Objective
from vllm_specformer.training.slot_loss import Mix

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # losses are summed in float32
WEIGHTS = (1.0, 0.7, 0.2)


@pytest.fixture(params=[{}, {"draft_vocab_size": 26}], ids=["all", "draft-vocabulary"])
def head(request: pytest.FixtureRequest, target_model: PreTrainedModel) -> LeaningHead:
    gates = {"markov_rank": 4, "markov_gate": True}
    return random_head(LeaningHead, target_model, **gates, **request.param)


@pytest.fixture
def target(head: LeaningHead, target_model: PreTrainedModel) -> HookedTarget:
    target = HookedTarget(target_model, head.config.aux_hidden_state_layer_ids)
    if head.draft_token_ids is not None:
        target.score_only(head.draft_token_ids)
    return target


@pytest.fixture
def rows(target: HookedTarget) -> HookedRows:
    return rows_of(target)


def gradients(head: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in head.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sample", [0, 16])
def test_it_trains_the_head_that_is_saved(
    head: LeaningHead, target: HookedTarget, rows: HookedRows, sample: int
) -> None:
    """Equal losses; and by the chain rule A's gradient is of U's, B's of V's."""
    objective = Objective(WEIGHTS, Mix(0.3, 0.2), memory=20_000, sample=sample)
    saved = head.merged(target).train()
    loss, per_slot = head(rows, target, 3, objective)
    expected, expected_per_slot = saved(rows, target, 3, objective)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(per_slot, expected_per_slot, **CLOSE)
    loss.backward()
    got = gradients(head)
    for parameter in saved.parameters():
        parameter.requires_grad_()
        parameter.grad = None
    saved(rows, target, 3, objective)[0].backward()
    plain = gradients(saved)

    embedded = target.embed(torch.arange(40)).double()
    normed = F.rms_norm(embedded, embedded.shape[-1:], eps=head.config.rms_norm_eps)
    weight = target.target.get_output_embeddings().weight.double()
    if head.draft_token_ids is not None:
        weight = weight[SCORED]
    plain["markov_in.weight"] = plain["markov_embed.weight"].T @ normed
    plain["markov_out.weight"] = 0.1 * weight.T @ plain["markov_lm_head.weight"]
    assert got.keys() == plain.keys() == dict(head.named_parameters()).keys()
    for name, gradient in got.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, plain[name], **CLOSE)


def test_new_matrices_change_nothing_but_the_first_table(
    target_model: PreTrainedModel, head: LeaningHead, target: HookedTarget
) -> None:
    """A fresh head has no Markov term yet, whatever leans on what."""
    fresh = LeaningHead(head.config).double()
    if head.draft_token_ids is not None:
        assert fresh.draft_token_ids is not None
        fresh.draft_token_ids.copy_(head.draft_token_ids)
    saved = fresh.merged(target)
    assert not saved.markov_lm_head.weight.any()
    assert saved.state_dict().keys() == fresh.state_dict().keys() - {
        "markov_in.weight", "markov_out.weight",
    }  # fmt: skip


def test_capped_logits_are_not_linear(target: HookedTarget) -> None:
    assert target.is_linear
    target._softcap = 30.0
    assert not target.is_linear
