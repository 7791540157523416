"""Drafts of whole sets of texts, and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.answered_pair import MAX_TOKENS, Pair
from vllm_specformer.evaluation import replay as replay_module
from vllm_specformer.evaluation.replay import (
    BOUND,
    DRAWN,
    HEAD,
    LOOKUP_2_3,
    LOOKUP_3,
    DraftedText,
    draft_texts,
    less_repetitive_half,
    replay,
)
from vllm_specformer.training.texts import Text, Texts


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "all slots"])
def test_drafts_are_those_of_the_served_head(
    pair: Pair, packed: bool, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches and by several budgets at once as one text and one budget at a time."""
    monkeypatch.setattr(pair.head.config, "nested_slots", nested)
    texts = list(draft_texts(pair.head, pair.target, pair.texts(1.0), (1, 3, 8), packed))
    assert sorted(text.id for text in texts) == pair.texts(1.0).ids.tolist()
    served = super(type(pair.head), pair.head)
    compared = 0
    for text in texts[:4]:
        tokens = torch.tensor(text.tokens)
        start, end = text.answers[0]
        states, _ = pair.target(tokens[None])
        anchors = torch.arange(len(tokens) - 1)[None]
        for count in (1, 3, 8):
            bonus = tokens[None, 1:]
            slots = served.forward(
                states, anchors, pair.target.embed(bonus), pair.head.slots_to_run(count)
            )
            normed = pair.target.norm(slots[:, :, :count])
            gates = pair.head.markov_gates(normed)
            expected = pair.head.draft(pair.target.lm_head(normed), bonus, gates)[0].tolist()
            assert sorted(text.drafts[count]) == list(range(start - 1, end - 2))
            for position, drafts in text.drafts[count].items():
                assert drafts == expected[position], (text.id, position, count)
                compared += 1
    assert compared > 100


def test_best_tokens_are_the_targets(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The greedy answers themselves, and what a whole forward pass says about sampled ones."""
    for text in draft_texts(pair.head, pair.target, pair.texts(0.0), (1,), True):
        start, end = text.answers[0]
        assert text.best[start - 1 : end - 1] == text.tokens[start:end]
    first, *others = pair.answers[1.0]
    long = Text(99, np.tile(first.input_ids, 4), first.spans, 1.0)
    sharing = Texts.collect([long, *others], 512)
    monkeypatch.setattr(replay_module, "_BATCH_TOKENS", 2 * len(long.input_ids))  # two rows
    for text in draft_texts(pair.head, pair.target, sharing, (1,), True):
        logits = pair.target.target(torch.tensor([text.tokens])).logits[0]
        assert text.best == logits.argmax(-1).tolist()


def test_bound_and_lookup(pair: Pair) -> None:
    """On greedy text the bound is perfect; on sampled text nothing passes it."""
    greedy = list(draft_texts(pair.head, pair.target, pair.texts(0.0), (4,), True))
    bound = replay(greedy, BOUND, 4)
    assert bound.accepted == bound.offered
    sampled = list(draft_texts(pair.head, pair.target, pair.texts(1.0), (4,), True))
    by_method = {m: replay(sampled, m, 4) for m in (HEAD, BOUND, LOOKUP_3, LOOKUP_2_3)}
    assert 1.1 < by_method[HEAD].tokens_per_step < by_method[BOUND].tokens_per_step < 5
    assert {a.tokens for a in by_method.values()} == {by_method[HEAD].tokens}
    drawn = replay(sampled, DRAWN, 4)
    assert drawn.tokens == pytest.approx(by_method[HEAD].tokens)
    assert by_method[HEAD].tokens_per_step < drawn.tokens_per_step < 5
    assert all(text.chances == {} for text in greedy)


@torch.no_grad()
@pytest.mark.parametrize("markov", [True, False])
def test_chances_are_those_of_the_served_head(
    pair: Pair, markov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min(1, q / p) of the text's own tokens, each draft following the text's token before it."""
    if not markov:
        monkeypatch.setattr(pair.head.config, "markov_rank", 0)
    served = super(type(pair.head), pair.head)
    compared = 0
    for text in list(draft_texts(pair.head, pair.target, pair.texts(1.0), (1, 3), True))[:3]:
        tokens = torch.tensor(text.tokens)
        start, end = text.answers[0]
        states, last = pair.target(tokens[None])
        p = pair.target.lm_head(last)[0].softmax(-1)
        anchors = torch.arange(len(tokens) - 1)[None]
        for count in (1, 3):
            slots = served.forward(
                states, anchors, pair.target.embed(tokens[None, 1:]), pair.head.slots_to_run(count)
            )
            normed = pair.target.norm(slots[0, :, :count])
            logits, gates = pair.target.lm_head(normed), pair.head.markov_gates(normed)
            assert sorted(text.chances[count]) == list(range(start - 1, end - 2))
            for position, chances in text.chances[count].items():
                for slot, chance in enumerate(chances):
                    place = position + 2 + slot
                    if place >= end:
                        assert chance == 0
                        continue
                    scores = logits[position, slot]
                    if markov:
                        gate = None if gates is None else gates[position, slot]
                        scores = scores + pair.head.markov_logits(tokens[place - 1], gate)
                    q = scores.softmax(-1)[tokens[place]]
                    expected = min(1.0, float(q / p[place - 1, tokens[place]]))
                    assert chance == pytest.approx(expected, rel=1e-3, abs=1e-6)
                    compared += 1
    assert compared > 100


END = 0


def text(number: int, answer: list[int]) -> DraftedText:
    return DraftedText(number, [0, *answer], [(1, 1 + len(answer))], 0.0, {}, [])


def test_less_repetitive_half() -> None:
    loop, novel, mixed = [7] * 12, list(range(12)), [1, 2, 3, 4, 5, 6] * 2
    texts = [text(0, loop), text(1, novel), text(2, mixed), text(3, loop)]
    assert [t.id for t in less_repetitive_half(texts)] == [1, 2]
    assert [t.id for t in less_repetitive_half(texts[:1])] == [0]


def test_lookup_on_a_text() -> None:
    """1 2 3 4 | 1 2 3 4 1 2 3 4: once the pattern is known, all of it is."""
    repeating = DraftedText(0, [1, 2, 3, 4] * 3, [(4, 12)], 0.0, {}, [])
    found = replay([repeating], LOOKUP_3, 2)
    # Behind the bonus tokens 1 and 2 nothing is known; behind 3, and then 2, two drafts are right.
    assert (found.steps, found.tokens) == (4, 8)


def test_answers_follow_the_limits(pair: Pair) -> None:
    for answers in pair.answers.values():
        lengths = [end - start for text in answers for start, end in text.spans]
        assert max(lengths) == MAX_TOKENS
        for text in answers:
            ((start, _),) = text.spans
            assert END not in text.input_ids[start:-1].tolist()
    ended = [text.input_ids[-1] == END for text in pair.answers[0.0]]
    assert 0 < sum(ended) < len(ended)
