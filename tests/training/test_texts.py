"""Which positions are learnt from, and what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.paths import TARGET
from support.training_texts import make_texts, write_distilled
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.data.shards import read_shards
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.training.texts import Text, Texts, read_texts, split


def text(length: int, *spans: tuple[int, int], id: int = 0, temperature: float = 0.0) -> Text:
    return Text(id, np.arange(length, dtype=np.int32), spans, temperature)


@pytest.mark.parametrize(
    ("spans", "anchors", "ends"),
    [
        # From the token before the answer to the last that has a bonus token and a label behind it.
        ([(3, 8)], [2, 3, 4, 5], [8, 8, 8, 8]),
        ([(3, 5)], [2], [5]),
        ([(0, 4)], [0, 1], [4, 4]),
        ([(2, 5), (7, 10)], [1, 2, 6, 7], [5, 5, 10, 10]),
        ([(2, 3), (7, 10)], [6, 7], [10, 10]),  # one token: nothing is left to draft
    ],
)
def test_anchors(spans: list[tuple[int, int]], anchors: list[int], ends: list[int]) -> None:
    texts = Texts.collect([text(10, *spans)], 10)
    found = texts.anchors(0)
    assert (found[0].tolist(), found[1].tolist()) == (anchors, ends)


def test_long_texts_are_cut_and_useless_ones_left_out() -> None:
    texts = Texts.collect(
        [text(9, (6, 9), id=2), text(20, (2, 6), (8, 20), id=1), text(20, (15, 20), id=0)], 10
    )
    assert texts.ids.tolist() == [1, 2]
    assert texts.lengths.tolist() == [10, 9]
    assert texts.answers(0) == [(2, 6), (8, 10)]
    assert texts.answers(1) == [(6, 9)]
    assert texts.skipped == {"cut": 2, "without_anchor": 1}


def test_nothing_to_learn_from() -> None:
    with pytest.raises(SpecFormerError, match="no text has an answer of 3 tokens within --max-len"):
        Texts.collect([text(9, (8, 9))], 10)


def test_shards_are_read_as_they_were_written(tmp_path: Path) -> None:
    texts = make_texts(20, 2048)
    write_distilled(tmp_path / "data", texts, shards=3)
    manifest = read_manifest(tmp_path / "data")
    again = Texts.collect(read_texts(read_shards(tmp_path / "data", manifest)), 1024)
    assert (again.tokens == texts.tokens).all()
    assert [again.answers(i) for i in range(20)] == [texts.answers(i) for i in range(20)]
    assert (again.temperatures == texts.temperatures).all()
    assert manifest.target.name_or_path == str(TARGET)


def test_held_out_texts_stay_held_out_when_data_is_added() -> None:
    few, many = make_texts(50, 40), make_texts(200, 40)
    train, held_out = split(few, 0.3, 1000)
    more_train, more_held_out = split(many, 0.3, 1000)
    assert set(held_out) <= set(more_held_out)
    assert set(train) <= set(more_train)
    assert not set(more_train) & set(more_held_out)
    assert len(more_train) == pytest.approx(140, abs=25)


def test_evaluation_takes_greedy_texts() -> None:
    texts = make_texts(100, 40)
    _, held_out = split(texts, 0.2, 5)
    assert len(held_out) == 5
    assert not texts.temperatures[held_out].any()
    sampled = Texts.collect([text(9, (2, 9), id=i, temperature=1.0) for i in range(9)], 10)
    assert len(split(sampled, 0.2, 5)[1])


def test_small_shares() -> None:
    texts = make_texts(10, 40)
    assert len(split(texts, 0.0, 5)[1]) == 0
    assert len(split(texts, 1e-9, 5)[0]) == 9
    with pytest.raises(SpecFormerError, match="leaves none of the 10 texts to train on"):
        split(texts, 0.9999, 5)
