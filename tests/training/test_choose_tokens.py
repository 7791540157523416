"""Which tokens a draft vocabulary holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from support.paths import TARGET
from support.training_runs import command, refusal, train
from support.training_texts import make_texts
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.data.shards import read_shards
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.training.draft_vocabulary import choose_tokens, coverage, suggestion
from vllm_specformer.training.texts import Text, Texts, read_texts, split


def texts() -> Texts:
    """Answers of two texts: 5 5 5 9 9 2 2, then 7 8 8 8 8; elsewhere token 1."""
    first = Text(
        0, np.array([1, 1, 1, 5, 5, 5, 9, 9, 1, 1, 2, 2, 2], np.int32), ((3, 8), (10, 13)), 0
    )
    second = Text(1, np.array([1, 7, 8, 8, 8, 8], np.int32), ((1, 6),), 0)
    return Texts.collect([first, second], 12)  # the last 2 of the first text is cut


@pytest.mark.parametrize(
    ("indices", "size", "always", "chosen"),
    [
        ([0, 1], 1, [], [8]),
        ([0, 1], 2, [], [5, 8]),
        ([0, 1], 4, [], [2, 5, 8, 9]),  # 2 and 9 are equally frequent
        ([0, 1], 3, [], [2, 5, 8]),
        ([0], 1, [], [5]),
        ([0, 1], 2, [3], [3, 8]),
        ([0, 1], 2, [3, 7, 99], [3, 7]),  # no token 99
        ([0, 1], 6, [], [0, 2, 5, 7, 8, 9]),  # 0 and 1 are in no answer
        ([0, 1], 12, [], list(range(12))),
    ],
)
def test_the_most_frequent_answer_tokens(
    indices: list[int], size: int, always: list[int], chosen: list[int]
) -> None:
    found = choose_tokens(texts(), np.array(indices), size, 12, always)
    assert found.dtype == np.int64
    assert found.tolist() == chosen


def test_no_room_for_the_end() -> None:
    with pytest.raises(SpecFormerError, match="--draft-vocab 1: the target has 2 tokens that end"):
        choose_tokens(texts(), np.array([0]), 1, 12, [3, 4])


def test_coverage() -> None:
    both = np.array([0, 1])
    assert coverage(texts(), both, np.array([8, 9]), 12) == 6 / 12
    assert coverage(texts(), np.array([1]), np.array([7]), 12) == 1 / 5
    assert coverage(texts(), both, np.arange(12), 12) == 1


def test_counts_are_those_of_a_plain_loop() -> None:
    made, counts = make_texts(30, 50), Counter[int]()
    for index in range(0, 30, 2):
        for start, end in made.answers(index):
            counts.update(made.input_ids(index)[start:end].tolist())
    ranked = sorted(range(50), key=lambda token: (-counts[token], token))
    found = choose_tokens(made, np.arange(0, 30, 2), 20, 50, [])
    assert found.tolist() == sorted(ranked[:20])


def test_training_chooses_from_what_it_trains_on(pair: Path, tmp_path: Path) -> None:
    """And the served weights, the provenance and the card carry the choice."""
    out = tmp_path / "out"
    provenance = train(pair, out, draft_vocab=9, max_steps=4)
    distilled = read_manifest(pair / "data")
    read = Texts.collect(read_texts(read_shards(pair / "data", distilled)), 2048)
    trained, held_out = split(read, 0.05, 64)
    ends = json.loads((pair / "target" / "config.json").read_text())["eos_token_id"]
    expected = choose_tokens(read, trained, 9, 40, [] if ends is None else [ends])
    saved = load_file(out / "model.safetensors")["draft_token_ids"]
    assert saved.tolist() == expected.tolist()
    assert provenance["texts"]["covered"] == coverage(read, held_out, expected, 40) < 1
    card = " ".join((out / "README.md").read_text().split())
    assert f"{provenance['texts']['covered']:.1%} of the held-out answers" in card


def test_too_many_tokens(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, command(pair, tmp_path / "out", draft_vocab=41))
    assert "draft_vocab_size=41 must be at most vocab_size=40" in message


@pytest.mark.parametrize(("number", "proposed"), [(4, None), (400, 512)])
def test_a_size_is_proposed_where_the_texts_tell(number: int, proposed: int | None) -> None:
    """All texts draw from the same 400 tokens; four of them show too few."""
    config = SpecFormerConfig.preset(
        "default", AutoConfig.from_pretrained(TARGET), "t", vocab_size=32_768
    )
    draw = np.random.default_rng(0)
    written = draw.integers(1000, 1400, (number, 50), dtype=np.int32)
    texts = Texts.collect([Text(n, row, ((1, 50),), 0) for n, row in enumerate(written)], 50)
    lines = suggestion(texts, np.arange(number), config)
    assert [f"--draft-vocab {proposed} " in line for line in lines] == [True] * bool(proposed)
