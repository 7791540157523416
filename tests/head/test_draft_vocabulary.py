"""Heads that score some of the target's tokens only: what they draft, and what files may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.pairing import HeadWeightError, check_weights

VOCAB, SLOTS = 23, 3
SCORED = torch.tensor([1, 4, 5, 9, 16, 20, 22])
ABSENT = -100


def make(**changes: Any) -> SpecFormerHead:
    target = Qwen3Config(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=16,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    fields = {"num_draft_slots": SLOTS, "draft_vocab_size": len(SCORED)} | changes
    torch.manual_seed(0)
    head = SpecFormerHead(SpecFormerConfig.preset("default", target, "t", **fields))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if head.draft_token_ids is not None:
        head.draft_token_ids.copy_(SCORED)
    return head


@pytest.mark.parametrize("markov_rank", [0, 2])
def test_greedy_drafts_are_the_best_scored_tokens(markov_rank: int) -> None:
    """Against loops over target ids; the token before may be one that is not scored."""
    head = make(markov_rank=markov_rank)
    torch.manual_seed(1)
    logits = torch.randn(5, SLOTS, VOCAB)
    bonus = torch.tensor([0, 1, 7, 20, 21])
    drafts = head.draft(logits, bonus)
    assert torch.equal(head.draft(logits[..., SCORED], bonus), drafts)
    for row in range(5):
        previous = int(bonus[row])
        for slot in range(SLOTS):
            scores = {int(token): float(logits[row, slot, token]) for token in SCORED}
            if markov_rank:
                before = head.markov_embed.weight[previous].detach()
                for place, token in enumerate(SCORED.tolist()):
                    scores[token] += float(before @ head.markov_lm_head.weight[place].detach())
            previous = max(scores, key=scores.__getitem__)
            assert int(drafts[row, slot]) == previous
    assert not torch.equal(drafts, logits.argmax(-1)), "the best token is always a scored one"


def test_markov_term_takes_any_token_and_adds_to_scored_ones() -> None:
    head = make(markov_rank=2)
    assert head.markov_embed.weight.shape == (VOCAB, 2)
    assert head.markov_logits(torch.arange(VOCAB)).shape == (VOCAB, len(SCORED))


def test_places_and_tokens() -> None:
    head, whole = make(), make(draft_vocab_size=0)
    tokens = torch.tensor([[ABSENT, 0, 1, 4], [22, 21, 20, 3]])
    assert head.to_indices(tokens, ABSENT).tolist() == [
        [ABSENT, ABSENT, 0, 1],
        [6, ABSENT, 5, ABSENT],
    ]
    assert torch.equal(head.to_tokens(torch.arange(len(SCORED))), SCORED)
    assert whole.to_indices(tokens, ABSENT) is tokens
    assert whole.to_tokens(tokens) is tokens


def test_values_over_the_whole_vocabulary() -> None:
    values = torch.randn(4, len(SCORED))
    spread = make().over_vocabulary(values, float("-inf"))
    assert spread.shape == (4, VOCAB)
    assert torch.equal(spread[:, SCORED], values)
    assert int(spread.isinf().sum()) == 4 * (VOCAB - len(SCORED))
    assert make(draft_vocab_size=0).over_vocabulary(values, 0.0) is values


def saved(directory: Path, **changes: Any) -> Path:
    make(**changes).bfloat16().save_pretrained(directory)
    return directory


def test_survives_saving(tmp_path: Path) -> None:
    config = read_head_config(saved(tmp_path, markov_rank=2))
    assert config.draft_vocab_size == len(SCORED)
    check_weights(tmp_path, config)
    loaded = SpecFormerHead.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.fc.weight.dtype == torch.float32
    assert loaded.draft_token_ids is not None
    assert loaded.draft_token_ids.dtype == torch.int64
    assert torch.equal(loaded.draft_token_ids, SCORED)


def test_the_whole_vocabulary_needs_no_list(tmp_path: Path) -> None:
    check_weights(saved(tmp_path, draft_vocab_size=0), read_head_config(tmp_path))
    assert "draft_token_ids" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (None, r"'draft_token_ids' is missing.*must come from the same training"),
        (SCORED[1:], r"'draft_token_ids' has shape \[6\], expected \[7\]"),
        (SCORED.int(), r"'draft_token_ids' is int32, expected int64"),
        (SCORED - 2, r"'draft_token_ids' reaches from -1 to 20, the target has tokens 0 to 22"),
        (SCORED + 1, r"'draft_token_ids' reaches from 2 to 23, the target has tokens 0 to 22"),
        (SCORED.clamp(max=20), r"'draft_token_ids' is not strictly increasing; copy or train"),
        (SCORED[[0, 2, 1, 3, 4, 5, 6]], r"'draft_token_ids' is not strictly increasing"),
    ],
)
def test_bad_vocabulary_is_refused(
    tmp_path: Path, token_ids: torch.Tensor | None, message: str
) -> None:
    config = read_head_config(saved(tmp_path))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["draft_token_ids"]
    if token_ids is not None:
        tensors["draft_token_ids"] = token_ids.contiguous()
    save_file(tensors, path)
    with pytest.raises(HeadWeightError, match=message):
        check_weights(tmp_path, config)
