"""Drafts out of a draft vocabulary: target ids, the target's noise, probability 0 for the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from support.paths import TARGET
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator
from vllm_specformer.head import SpecFormerHead

REQUESTS, STEPS, STATES, SCORED = 3, 4, 5, 90
ROWS = REQUESTS * STEPS


def make_head(vocabulary: int, scored: Tensor, **markov: Any) -> SpecFormerHead:
    target = AutoConfig.from_pretrained(TARGET)
    changes = {"vocab_size": vocabulary, "draft_vocab_size": len(scored)}
    config = SpecFormerConfig.preset("default", target, "t", **changes, **markov)
    head = SpecFormerHead(config)
    head.draft_token_ids.copy_(scored)
    if markov:
        torch.nn.init.normal_(head.markov_lm_head.weight)
        torch.nn.init.normal_(head.markov_embed.weight)
    return head


@pytest.fixture(
    params=[{}, {"markov_rank": 4}, {"markov_rank": 4, "markov_gate": True}],
    ids=["no-markov", "markov", "gates"],
)
def head(request: pytest.FixtureRequest) -> SpecFormerHead:
    torch.manual_seed(0)
    return make_head(2048, torch.randperm(2048)[:SCORED].sort().values, **request.param)


def speculator(head: SpecFormerHead, kind: str) -> SpecFormerSpeculator:
    """What `_sample` needs of one: its buffers as `_stage` fills them."""
    ours: Any = object.__new__(SpecFormerSpeculator)
    ours.model = SimpleNamespace(head=head)
    ours.num_speculative_steps = STEPS
    ours.draws_with_target = kind == "coupled"
    ours._best = None
    ours.draft_logits = None
    if kind == "probabilistic":
        ours.draft_logits = torch.zeros(STATES, STEPS, head.config.vocab_size)
    ours.use_local_argmax_reduction = ours.use_fp64_gumbel = False
    ours.acceptance_estimator = ours.draft_watermarker = None
    ours.temperature = torch.tensor([0.7, 0.0, 1.0, 1.3, 0.9])
    ours.seeds = torch.tensor([11, 12, 13, 14, 15])
    ours.sample_idx_mapping = torch.tensor([3, 1, 0]).repeat_interleave(STEPS)
    ours.sample_col = torch.arange(STEPS).repeat(REQUESTS).int()
    ours.sample_pos = torch.arange(100, 100 + ROWS)
    ours.draft_tokens = torch.zeros(REQUESTS, STEPS, dtype=torch.int64)
    return ours


def one_by_one(
    ours: SpecFormerSpeculator,
    head: SpecFormerHead,
    kind: str,
    logits: Tensor,
    gates: Tensor | None,
    bonus: Tensor,
) -> tuple[Tensor, Tensor]:
    """Drafts [R, K] drawn from logits over the whole vocabulary, and those [R, K, V]."""
    full = torch.full((REQUESTS, STEPS, head.config.vocab_size), float("-inf"))
    # With a cache of logits vLLM 0.33 draws by a noise of the step's own.
    cache = torch.zeros(STATES, STEPS, head.config.vocab_size) if kind == "probabilistic" else None
    expected = torch.zeros(REQUESTS, STEPS, dtype=torch.int64)
    for request in range(REQUESTS):
        previous = bonus[request]
        for step in range(STEPS):
            row = request * STEPS + step
            scores = logits[row]
            if head.config.markov_rank:
                gate = None if gates is None else gates[request, step]
                scores = scores + head.markov_logits(previous, gate)
            full[request, step, head.draft_token_ids] = scores
            previous = full[request, step].argmax()
            if kind != "greedy":
                previous = gumbel_sample(
                    full[request, step][None],
                    ours.sample_idx_mapping[row : row + 1],
                    ours.temperature,
                    ours.seeds,
                    ours.sample_pos[row : row + 1],
                    apply_temperature=True,
                    is_drafting=kind == "probabilistic",
                    logits_cache=cache,
                    logits_cache_col=ours.sample_col[row : row + 1],
                )[0]
            expected[request, step] = previous
    return expected, full


@torch.no_grad()
@pytest.mark.parametrize("kind", ["greedy", "probabilistic", "coupled"])
def test_drafts_are_those_over_the_whole_vocabulary(head: SpecFormerHead, kind: str) -> None:
    """With -inf for what is not scored: the same noise, by target id, the same probability."""
    ours = speculator(head, kind)
    logits, bonus = 2 * torch.randn(ROWS, SCORED), torch.tensor([5, 6, 7])
    gates = torch.randn(REQUESTS, STEPS, 4) if head.config.markov_gate else None
    if gates is not None:
        gates[:, 0] = 0  # as `markov_gates` has them
    expected, full = one_by_one(ours, head, kind, logits, gates, bonus)
    if head.config.markov_rank:
        ours._sample_in_order(logits.view(REQUESTS, STEPS, -1), gates, bonus)
        found = ours.draft_tokens
    else:
        found = ours._sample(logits, REQUESTS, slice(0, STEPS)).view(REQUESTS, STEPS)
    assert found.tolist() == expected.tolist()
    if ours.draft_logits is not None:
        # vLLM verifies by what it finds here, in the place of each request's state.
        torch.testing.assert_close(ours.draft_logits[[3, 1, 0]], full)
        assert not ours.draft_logits[[2, 4]].any()


# The 1e-4 quantile of the chi-square law with four degrees of freedom.
FARTHEST = 23.5


@torch.no_grad()
def test_verified_drafts_have_the_targets_law() -> None:
    """Through vLLM's rejection sampler, which reads the logits that were cached.

    Some tokens the target may say are never drafted, one that is drafted it never says, and one is
    neither.
    """
    requests, vocabulary = 300, 7
    target = torch.tensor([0.3, 1.5, 0.8, -0.5, float("-inf"), 0.5, float("-inf")])
    torch.manual_seed(0)
    ours = speculator(make_head(vocabulary, torch.tensor([1, 3, 4])), "probabilistic")
    ours.draft_logits = torch.zeros(requests, 1, vocabulary)
    ours.temperature = torch.full((requests,), 0.8)
    ours.seeds = torch.randint(2**62, (requests,))
    ours.sample_idx_mapping = torch.arange(requests)
    ours.sample_col = torch.zeros(requests, dtype=torch.int32)
    ours.sample_pos = torch.full((requests,), 20)
    ours.num_speculative_steps = 1
    logits = torch.tensor([[1.0, 2.0, 0.5]]).repeat(requests, 1)
    drafts = ours._sample(logits, requests, slice(0, 1))
    assert drafts.unique().tolist() == [1, 3, 4]

    rows = torch.arange(requests).repeat_interleave(2)
    sampled, _ = rejection_sample(
        (target / 0.8).repeat(2 * requests, 1),
        ours.draft_logits,
        torch.stack([torch.zeros_like(drafts), drafts], dim=1).flatten(),
        torch.arange(requests + 1, dtype=torch.int32) * 2,
        torch.tensor([20, 21]).repeat(requests),
        torch.arange(requests),
        rows,
        torch.tensor([0, 1]).repeat(requests),
        ours.temperature,
        ours.seeds,
        1,
    )
    expected = requests * (target / 0.8).softmax(-1)
    counts = sampled[:, 0].bincount(minlength=vocabulary)
    assert counts[expected == 0].sum() == 0
    said = expected > 0
    distance = ((counts - expected).square() / expected)[said].sum()
    accepted = (sampled[:, 0] == drafts).float().mean()
    print(f"chi-square {distance:.1f}, accepted {accepted:.2f}, counts {counts.tolist()}")
    assert distance < FARTHEST
    assert 0.1 < accepted < 0.8
