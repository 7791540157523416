"""Where greedy drafts are better for sampled requests than drawn ones: what `draws/rules.py` says.

Replayed on answers of the bundled target under each filter; with `-s` the table of
docs/sampled-requests.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from support.answered_pair import Pair
from support.paths import ROOT, TARGET
from vllm_specformer.distill.encode import load_encoder
from vllm_specformer.engine.draws.rules import NARROW_TOP_K, NARROW_TOP_P
from vllm_specformer.training.acceptance import Acceptance
from vllm_specformer.training.heldout import drafts_by_text, run_target
from vllm_specformer.training.packing import Budget, collate, plan_all
from vllm_specformer.training.texts import Text, Texts

pytestmark = pytest.mark.slow

K, MAX_TOKENS, END = 4, 64, 0
PROMPTS = ROOT / "benchmarks" / "prompts-load.jsonl"
FIRST, LAST = 47, 103  # lines 48 to 103


def keep(scores: Tensor, top_p: float, top_k: int) -> Tensor:
    """Scores with -inf outside of the k best and of the nucleus."""
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], -torch.inf)
    ordered, places = scores.sort(-1)
    outside = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    outside[..., -1] = False
    return torch.empty_like(scores).scatter_(-1, places, ordered.masked_fill(outside, -torch.inf))


@torch.inference_mode()
def answers(pair: Pair, temperature: float, top_p: float, top_k: int) -> Texts:
    encoder, lines = load_encoder(TARGET, chats=False), PROMPTS.read_text().splitlines()
    prompts = [encoder.text(json.loads(line)["prompt"]) for line in lines[FIRST:LAST]]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    model = pair.target.target
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k, eos_token_id=END,
        max_new_tokens=MAX_TOKENS, pad_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    texts = []
    for number, row in enumerate(model.generate(ids, attention_mask=mask)[:, width:].tolist()):
        made = row[: row.index(END) + 1] if END in row else row
        start = len(prompts[number])
        tokens = np.array([*prompts[number], *made], dtype=np.int32)
        texts.append(Text(number, tokens, ((start, len(tokens)),), temperature))
    return Texts.collect(
        [text for text in texts if len(text.input_ids) > text.spans[0][0] + 1], 512
    )


def tokens_per_step(
    pair: Pair, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[float, float]:
    """With greedy and with drawn drafts."""
    texts = answers(pair, temperature, top_p, top_k)
    greedy, drawn = Acceptance(K), Acceptance(K)
    for batch in plan_all(texts.lengths, Budget(4096, packed=True)):
        rows = run_target(pair.target, collate(texts, batch, None, None), True)
        best, _, _ = pair.head.drafts(rows, pair.target, K)
        chances = pair.head.chances(
            rows, pair.target, K, temperature, keep=partial(keep, top_p=top_p, top_k=top_k)
        )
        for number, row in enumerate(batch):
            made = dict(drafts_by_text(texts, row, best[number].numpy()))
            chance = dict(drafts_by_text(texts, row, chances[number].numpy()))
            for index in row:
                tokens = texts.input_ids(index).tolist()
                ((start, end),) = texts.answers(index)
                greedy.walk(tokens[:end], start, at(made[index]))
                drawn.expect(end, start, at(chance[index]))
    assert drawn.tokens == pytest.approx(greedy.tokens)
    return greedy.tokens_per_step, drawn.tokens_per_step


def at(values: dict[int, list[float]]) -> Callable[[int], list[float]]:
    return lambda position: values.get(position, [])


def test_the_rule_gives_each_request_the_better_drafts(pair: Pair) -> None:
    print("\ntemperature | top-p | top-k | greedy drafts | drawn drafts")
    for temperature, top_p, top_k in (
        (0.3, 1.0, 0),
        (0.6, 1.0, 0),
        (1.0, 1.0, 0),
        (1.0, 0.95, 0),
        (1.0, 0.8, 0),
        (1.0, 0.7, 0),
        (1.0, 0.6, 0),
        (1.0, 0.4, 0),
        (0.6, 0.5, 0),
        (1.0, 1.0, 4),
        (1.0, 1.0, 2),
    ):
        greedy, drawn = tokens_per_step(pair, temperature, top_p, top_k)
        print(f"{temperature:g} | {top_p:g} | {top_k or ''} | {greedy:.2f} | {drawn:.2f}")
        is_narrow = top_p < NARROW_TOP_P or 1 <= top_k <= NARROW_TOP_K
        assert (greedy > drawn) == is_narrow
