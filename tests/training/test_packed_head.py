"""Packed rows, part by part and slot by slot, give the losses and gradients of single texts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from support.toy_heads import SCORED, random_head, rows_of
from support.training_texts import make_texts
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import Objective, PackedHead
from vllm_specformer.training.slot_loss import IGNORED, Mix

# Losses are summed in float32, as in training; everything else here is float64.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
WEIGHTS = (1.0, 0.7, 0.2)
SMALL = 20_000  # bytes: about one anchor at a time
KINDS = {
    "default": {},
    "markov": {"markov_rank": 4},
    "window": {"context_window": 3, "context_sinks": 2},
    "two-slot-layers": {"num_slot_layers": 2},
    "gates": {"markov_rank": 4, "markov_gate": True},
    "draft-vocabulary": {"markov_rank": 4, "markov_gate": True, "draft_vocab_size": 26},
    "paper": {"slot_mask": "slots", "use_bonus_embedding": False, "nested_slots": False},
}


@pytest.fixture(params=sorted(KINDS))
def head(request: pytest.FixtureRequest, target_model: PreTrainedModel) -> PackedHead:
    return random_head(PackedHead, target_model, **KINDS[request.param])


@pytest.fixture
def target(head: PackedHead, target_model: PreTrainedModel) -> HookedTarget:
    return HookedTarget(target_model, head.config.aux_hidden_state_layer_ids)


def gradients(head: PackedHead) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    return found


def plain_losses(
    head: PackedHead,
    target: HookedTarget,
    rows: HookedRows,
    slots: Tensor,
    reduction: str = "mean",
) -> list[Tensor]:
    """Each slot's loss by the book, from all logits at once; slots [rows, A, 3, H]."""
    labels = rows.labels(3)
    logits = target.logits(slots)
    previous = torch.cat([rows.bonus_tokens[..., None], labels[..., :-1].clamp(min=0)], -1)
    if head.config.draft_vocab_size:
        places = {int(token): place for place, token in enumerate(SCORED)}
        logits = logits[..., SCORED]
        labels = torch.tensor([places.get(t, IGNORED) for t in labels.flatten().tolist()])
        labels = labels.view(previous.shape)
        assert 0 < (labels == IGNORED).sum() < (rows.labels(3) != IGNORED).sum()
    if head.config.markov_rank:
        logits = logits + head.markov_logits(previous, head.markov_gates(target.norm(slots)))
    return [
        F.cross_entropy(
            logits[:, :, i].flatten(0, 1), labels[:, :, i].flatten(), reduction=reduction
        )
        for i in range(3)
    ]


def weighted(losses: list[Tensor]) -> Tensor:
    return sum(w * x for w, x in zip(WEIGHTS, losses, strict=True)) / sum(WEIGHTS)


def test_gradients_are_those_of_all_logits_at_once(head: PackedHead, target: HookedTarget) -> None:
    """Against one plain backward pass; and no gradient leaks to the target."""
    rows = rows_of(target, make_texts(5, 40), [[0, 1], [2, 3], [4]])
    loss, per_slot = head(rows, target, 3, Objective(WEIGHTS, memory=SMALL))
    loss.backward()
    got = gradients(head)

    slots = head.slot_states(head._context(rows), rows, target, slice(None), 3)
    plain = plain_losses(head, target, rows, slots)
    total = weighted(plain)
    total.backward()

    torch.testing.assert_close(loss.double(), total.detach(), **CLOSE)
    torch.testing.assert_close(per_slot.double(), torch.stack(plain).detach(), **CLOSE)
    expected = gradients(head)
    assert got.keys() == expected.keys() == dict(head.named_parameters()).keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)
        assert got[name].any(), name
    assert all(p.grad is None for p in target.target.parameters())


def test_slots_weigh_less_behind_doubtful_tokens(head: PackedHead, target: HookedTarget) -> None:
    """`by_reach`: (1 + q) / 2 of every token before; one that is not scored has the q 0."""
    rows = rows_of(target, make_texts(5, 40), [[0, 1], [2, 3], [4]])
    objective = Objective(WEIGHTS, memory=SMALL, by_reach=True)
    loss, per_slot = head(rows, target, 3, objective)
    loss.backward()
    got = gradients(head)

    slots = head.slot_states(head._context(rows), rows, target, slice(None), 3)
    each = plain_losses(head, target, rows, slots, reduction="none")
    labels = head._labels(rows, 3)
    reach = torch.ones_like(each[0])
    sums = []
    for slot, losses in enumerate(each):
        sums.append((reach * losses).sum() / labels.counts[slot])
        scored = (labels.indices[:, :, slot] != IGNORED).flatten()
        reach = reach * (1 + scored * torch.exp(-losses.detach())) / 2
    total = weighted(sums)
    total.backward()
    torch.testing.assert_close(loss.double(), total.detach(), **CLOSE)
    unweighted = torch.stack([part.sum() for part in each]).detach() / labels.counts
    torch.testing.assert_close(per_slot.double(), unweighted, **CLOSE)
    for name, expected in gradients(head).items():
        torch.testing.assert_close(got[name], expected, **CLOSE)


def test_it_is_the_published_head_on_single_texts(head: PackedHead, target: HookedTarget) -> None:
    """`SpecFormerHead.forward`, which the engine is compared with, on one text."""
    rows = rows_of(target, make_texts(1, 40), [[0]])
    loss, per_slot = head(rows, target, 3, Objective(WEIGHTS))
    loss.backward()
    got = gradients(head)

    bonus = target.embed(rows.bonus_tokens)
    slots = SpecFormerHead.forward(head, rows.hooked_states, rows.anchors, bonus)
    plain = plain_losses(head, target, rows, slots)
    weighted(plain).backward()
    torch.testing.assert_close(per_slot.double(), torch.stack(plain).detach(), **CLOSE)
    for name, expected in gradients(head).items():
        torch.testing.assert_close(got[name], expected, **CLOSE)


@pytest.mark.parametrize("mix", [Mix(), Mix(0.4), Mix(0.1, 0.6)], ids=str)
def test_packed_is_unpacked(head: PackedHead, target: HookedTarget, mix: Mix) -> None:
    """Sums over packed rows equal the sums over the same texts, each in a row of its own."""
    texts = make_texts(7, 40)
    objective = Objective(WEIGHTS, mix)
    packed = rows_of(target, texts, [[0, 1, 2], [3, 4], [5, 6]])
    alone = [rows_of(target, texts, [[i]]) for i in range(7)]
    counts = torch.stack([head._labels(r, 3).counts for r in alone])
    loss, per_slot = head(packed, target, 3, objective)
    loss.backward()
    got = gradients(head)

    # One slot at a time, as only then means over texts add up to the mean over all.
    expected = torch.zeros((), dtype=torch.double)
    for slot in range(3):
        only = tuple(float(i == slot) for i in range(3))
        share = (counts[:, slot] / counts[:, slot].sum()).double()
        means = []
        for rows, part in zip(alone, share, strict=True):
            one, each = head(rows, target, 3, Objective(only, mix))
            weight = WEIGHTS[slot] / sum(WEIGHTS)
            (one * part * weight).backward()
            expected += one.detach() * part * weight
            means.append(each[slot])
        torch.testing.assert_close(
            per_slot[slot].double(), share @ torch.stack(means).double(), **CLOSE
        )
    torch.testing.assert_close(loss.double(), expected, **CLOSE)
    for name, gradient in gradients(head).items():
        torch.testing.assert_close(got[name], gradient, **CLOSE)


@pytest.mark.parametrize("head", ["draft-vocabulary"], indirect=True)
def test_the_rest_of_the_vocabulary_plays_no_part(head: PackedHead, target: HookedTarget) -> None:
    """Neither in the cross entropy nor in the divergence; nor does it matter who leaves it out."""
    rows = rows_of(target, make_texts(3, 40), [[0, 1], [2]])
    objective = Objective(WEIGHTS, Mix(0.5))
    loss, per_slot = head(rows, target, 3, objective)
    target.score_only(SCORED)
    narrowed, same = head(rows, target, 3, objective)
    torch.testing.assert_close((narrowed, same), (loss, per_slot))
    absent = torch.ones(40, dtype=torch.bool)
    absent[SCORED] = False
    with torch.no_grad():
        output = target.target.get_output_embeddings()
        output.weight[absent] += 100 * torch.randn(int(absent.sum()), 16, dtype=torch.double)
        other = HookedTarget(target.target, target.hook_ids)
        torch.testing.assert_close(head(rows, other, 3, objective)[0], loss)


@pytest.mark.parametrize("head", ["draft-vocabulary"], indirect=True)
def test_a_batch_without_a_scored_token_teaches_nothing(
    head: PackedHead, target: HookedTarget
) -> None:
    texts = make_texts(3, 40)
    texts.tokens[:] = 0
    loss, per_slot = head(rows_of(target, texts, [[0, 1], [2]]), target, 3, Objective(WEIGHTS))
    loss.backward()
    assert loss == 0
    assert per_slot.isnan().all()
    assert not any(gradient.any() for gradient in gradients(head).values())


@pytest.mark.parametrize("head", ["markov", "draft-vocabulary"], indirect=True)
def test_a_sample_of_the_vocabulary(head: PackedHead, target: HookedTarget) -> None:
    """The losses are those over the sampled tokens, each standing for its share of the others."""
    rows = rows_of(target, make_texts(3, 40), [[0, 1], [2]])
    if head.draft_token_ids is not None:
        target.score_only(SCORED)
    objective = Objective(WEIGHTS, Mix(0.3, 0.3), memory=SMALL, sample=18)
    loss, per_slot = head(rows, target, 3, objective)
    loss.backward()
    got = gradients(head)

    labels = head._labels(rows, 3)
    sample = head._sample(rows, target, labels, objective)
    assert sample is not None
    assert 15 < len(sample.indices) < head.config.num_scored_tokens
    slots = head.slot_states(head._context(rows), rows, target, slice(None), 3)
    losses = []
    for slot in range(3):
        seen = rows.at(rows.last_states, rows.after_anchors(1 + slot))
        p = (target.lm_head(seen)[..., sample.indices] + sample.offsets).softmax(-1)
        normed = target.norm(slots)
        gates = head.markov_gates(normed)
        gate = None if gates is None else gates[:, :, slot]
        logits = target.lm_head(normed[:, :, slot])
        logits = logits + head.markov_logits(labels.previous[..., slot], gate)
        log_q = (logits[..., sample.indices] + sample.offsets).log_softmax(-1)
        own = labels.indices[..., slot]
        kept = own != IGNORED
        place = (sample.indices == own.unsqueeze(-1)).double()
        assert torch.equal(place.sum(-1) == 1, kept)
        cross_entropy = -(place * log_q).sum(-1)
        divergence = (p * (p.log() - log_q)).sum(-1)
        variation = (p - log_q.exp()).abs().sum(-1) / 2
        each = 0.4 * cross_entropy + 0.3 * divergence + 0.3 * variation
        losses.append(each[kept].mean())
        torch.testing.assert_close(
            per_slot[slot].double(), cross_entropy[kept].mean().detach(), **CLOSE
        )
    total = weighted(losses)
    total.backward()
    torch.testing.assert_close(loss.double(), total.detach(), **CLOSE)
    for name, expected in gradients(head).items():
        torch.testing.assert_close(got[name], expected, **CLOSE)


@pytest.mark.parametrize("head", ["draft-vocabulary"], indirect=True)
def test_drafts_are_target_tokens(head: PackedHead, target: HookedTarget) -> None:
    rows = rows_of(target, make_texts(3, 40), [[0, 1], [2]])
    drafts, _, counts = head.drafts(rows, target, 3)
    labels = rows.labels(3)
    assert torch.isin(drafts, SCORED).all()
    assert drafts.unique().numel() > 3
    assert counts.tolist() == torch.isin(labels, SCORED).sum((0, 1)).tolist()
    target.score_only(SCORED)
    assert torch.equal(head.drafts(rows, target, 3)[0], drafts)
