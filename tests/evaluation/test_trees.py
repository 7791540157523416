"""Trees replayed on known texts: the walk, the noise of sampled texts, the ranking."""

from __future__ import annotations

import pytest
import torch
from specformer_kernels.noise import Stream, gumbel
from specformer_kernels.select_tree import Tree, select_tree
from torch import Tensor

from support.answered_pair import Pair
from vllm_specformer.candidates import Ranking, draft_lists
from vllm_specformer.evaluation.replay import draft_texts, replay_tree
from vllm_specformer.evaluation.trees import (
    GRID,
    RankingFit,
    ScoredPart,
    TreeReplay,
    followed,
    noise_given,
    share_error,
)
from vllm_specformer.training.slot_loss import IGNORED
from vllm_specformer.training.texts import Texts


def walk(tree: Tree, request: int, continuation: list[int]) -> int:
    """Token by token, child by child."""
    row = depth = 0
    for token in continuation:
        children = [
            child
            for child in range(1, tree.tokens.shape[1])
            if int(tree.parents[request, child]) == row
            and int(tree.tokens[request, child]) == token
        ]
        if not children or token < 0:
            break
        (row,) = children
        depth += 1
    return depth


def test_followed() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (200, 4, 2, 3)
    log_probs = torch.randn(shape, generator=generator).log_softmax(-1)
    tokens = torch.rand(shape, generator=generator).argsort(-1)  # different among siblings
    origins = torch.rand(200, 4, 6, generator=generator).argsort(-1)[..., :2].contiguous()
    tree = select_tree(log_probs, tokens, origins, 20)
    continuation = torch.randint(4, (200, 4), generator=generator)
    continuation[::3, 2:] = IGNORED
    found = followed(tree, continuation).tolist()
    assert found == [walk(tree, r, continuation[r].tolist()) for r in range(200)]
    assert set(found) == {0, 1, 2, 3, 4}


def test_noise_given_a_text_is_gumbel_noise_under_which_the_text_is_sampled() -> None:
    """Over texts drawn from the target it is independent and Gumbel, as the target's own is."""
    draws, logits = 40_000, torch.tensor([0.5, -1.0, 2.0, 0.0, -3.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(logits.softmax(-1), draws, replacement=True, generator=generator)
    rows = logits.expand(draws, -1)
    keys = torch.full((draws,), 7), torch.arange(draws)
    noise = noise_given(rows, chosen, *keys, torch.arange(6))
    assert torch.equal((rows + noise).argmax(-1), chosen)
    uniform = torch.exp(-torch.exp(-noise))  # of a Gumbel variable, by its distribution function
    bins = torch.stack([torch.histc(u, 10, 0, 1) for u in uniform.T])
    # 10 bins of 4,000 each: nine degrees of freedom, exceeded once in 10**6.
    assert ((bins - draws / 10) ** 2 / (draws / 10)).sum(1).max() < 45
    # 1 / sqrt(draws) is the standard error of each; fifteen of them.
    assert (uniform.T.corrcoef() - torch.eye(6)).abs().max() < 5 / draws**0.5
    some = torch.tensor([1, 2])
    assert torch.equal(noise_given(rows, chosen, *keys, some), noise[:, some])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_of_one_text(pair: Pair, temperature: float) -> None:
    """Against a tree drafted at every anchor by itself from dense slot logits."""
    served = super(type(pair.head), pair.head)
    replay = TreeReplay((3, 16), seed=5, ranking=Ranking((0.8,) * 8, (0.9,) * 8))
    compared = 0
    for answer in pair.answers[temperature][:3]:
        texts = Texts.collect([answer], 512)
        (text,) = draft_texts(pair.head, pair.target, texts, (8,), False, trees=replay)
        tokens = torch.tensor(text.tokens)
        start, end = text.answers[0]
        states, last = pair.target(tokens[None])
        anchors, bonus = torch.arange(len(tokens) - 1)[None], tokens[None, 1:]
        noise = noise_of(pair, last[0], tokens, temperature) if temperature else None
        for nodes in (3, 16):
            count = min(nodes, 8)
            slots = served.forward(states, anchors, pair.target.embed(bonus), count)
            normed = pair.target.norm(slots)[0]
            logits, gates = pair.target.lm_head(normed), pair.head.markov_gates(normed)
            assert sorted(text.accepted[nodes]) == list(range(start - 1, end - 2))
            for position, accepted in text.accepted[nodes].items():
                at = slice(position, position + 1)
                own = logits[at].clone()
                if noise is not None:
                    own += temperature * noise[position + 1 : position + 1 + count]
                # Greedy scores, as the noise is in them.
                ranking = Ranking(((0.9 if temperature else 0.8),) * 8, (9.0,) * 8)
                gate = None if gates is None else gates[at]
                lists = draft_lists(pair.head, own, bonus[0, at], gates=gate, ranking=ranking)
                tree = select_tree(*lists, nodes)
                ahead = text.tokens[position + 2 : end][:count]
                assert accepted == walk(tree, 0, ahead), (text.id, position)
                compared += 1
    assert compared > 50


def noise_of(pair: Pair, last: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """At every place of a text that is the only one of its batch; past its end it is free."""
    logits = pair.target.lm_head(last) / temperature
    vocabulary = torch.arange(logits.shape[1])
    places = torch.arange(len(tokens))
    seeds = torch.full_like(places, 5)
    noise = noise_given(logits[:-1], tokens[1:], seeds[1:], places[:-1], vocabulary)
    # What lies past the end only changes which nodes there are, not what the text accepts of
    # them, unless the tree is too small for both; so it must be the same here.
    last_place = torch.tensor([len(tokens) - 1])
    free = gumbel(seeds[:1, None], last_place[:, None], vocabulary, Stream.TARGET)
    return torch.cat([noise, free.expand(9, -1)])


def test_steps_of_trees(pair: Pair) -> None:
    """More nodes accept more; every token of the answers is emitted once."""
    replay = TreeReplay((1, 4, 16))
    for temperature in (0.0, 1.0):
        texts = list(
            draft_texts(pair.head, pair.target, pair.texts(temperature), (8,), True, trees=replay)
        )
        steps = {}
        for nodes in replay.nodes:
            found = [replay_tree(text, nodes, 8) for text in texts]
            assert sum(one.tokens for one in found) == sum(
                end - start for text in texts for start, end in text.answers
            )
            steps[nodes] = sum(one.steps for one in found)
            assert all(one.accepted <= one.offered for one in found)
        assert steps[1] > steps[4] > steps[16]


def test_ranking_is_found(pair: Pair) -> None:
    """Labels drawn at other temperatures than the scores say."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = pair.head.config.vocab_size
    truth = torch.tensor([0.5, 1.0, 2.0])
    fit = RankingFit(4)
    scores = 2 * torch.randn(1, 400, 3, vocabulary, generator=generator)
    bonus = torch.randint(vocabulary, (1, 400), generator=generator)
    labels = torch.empty(1, 400, 3, dtype=torch.int64)
    before = bonus
    for slot in range(3):
        biased = scores[:, :, slot] + pair.head.markov_logits(before).detach()
        drawn = (biased / truth[slot]).softmax(-1)[0]
        before = torch.multinomial(drawn, 1, generator=generator).T
        labels[:, :, slot] = before
    labels[:, ::7, 1:] = IGNORED
    with torch.no_grad():
        fit.add(pair.head, ScoredPart(slice(0, 400), scores, bonus, labels, None))
    found = torch.tensor(fit.ranking)
    assert found[3] == 1.0  # a slot without labels
    assert ((found[:3] / truth).log().abs() < 0.15).all(), found
    assert set(fit.ranking[:3]) <= set(GRID)


def test_share_error() -> None:
    """Of equal texts nothing; else that of the delta method, by simulation."""
    assert share_error([4, 4, 4], [2, 2, 2]) == 0.0
    assert share_error([5], [2]) == 0.0
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(5, 30, (2000, 100), generator=generator)
    tokens = steps + torch.poisson(2.0 * steps.double(), generator=generator).long()
    ratios = tokens.sum(1).double() / steps.sum(1)
    errors = [share_error(t, s) for t, s in zip(tokens.tolist(), steps.tolist(), strict=True)]
    assert sum(errors) / len(errors) == pytest.approx(float(ratios.std()), rel=0.05)
