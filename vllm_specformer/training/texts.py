"""Distilled conversations in memory, as flat arrays: what may be learnt from, and where.

An *anchor* is a position at which the head drafts. Only positions from the token before an answer
on are anchors, only tokens of the same answer are labels: a served head drafts nowhere else, and
what follows an answer's last token was not written by the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vllm_specformer.errors import SpecFormerError

if TYPE_CHECKING:
    import pyarrow as pa

# Tokens an anchor needs behind it: the bonus token, which the target has sampled, and one label.
BONUS_AND_LABEL = 2


@dataclass(frozen=True)
class Text:
    """One conversation: token ids and the half-open spans that the target generated."""

    id: int
    input_ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    temperature: float


@dataclass(frozen=True)
class Texts:
    """Conversations sorted by id, cut to a length, side by side in one array.

    `tokens` int32 [all], text `i` at `offsets[i]` to `offsets[i + 1]`. Anchors of a text are
    numbered from 0; `anchor_offsets` has their running total. `spans` int32 [n, 2] counts from the
    text's start, spans of text `i` at `span_offsets[i]` to `span_offsets[i + 1]`.
    """

    ids: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    span_offsets: np.ndarray
    temperatures: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def collect(cls, texts: Iterable[Text], max_length: int) -> Texts:
        """Keep what can be learnt from.

        A text longer than `max_length` is cut, which is counted under "cut"; one without an anchor
        is left out, under "without_anchor".

        Raises:
            SpecFormerError: nothing is left.
        """
        skipped = {"cut": 0, "without_anchor": 0}
        kept: list[Text] = []
        for text in texts:
            ids, spans = text.input_ids, text.spans
            if len(ids) > max_length:
                skipped["cut"] += 1
                ids = ids[:max_length]
                spans = tuple((s, min(e, max_length)) for s, e in spans if s < max_length)
            spans = tuple(span for span in spans if _count(*span))
            if spans:
                kept.append(Text(text.id, ids, spans, text.temperature))
            else:
                skipped["without_anchor"] += 1
        if not kept:
            raise SpecFormerError(
                f"--data: no text has an answer of {BONUS_AND_LABEL + 1} tokens within "
                f"--max-length {max_length}",
                "raise it or distil longer answers",
            )
        kept.sort(key=lambda text: text.id)
        return cls(
            ids=np.array([text.id for text in kept], dtype=np.int64),
            tokens=np.concatenate([text.input_ids for text in kept]).astype(np.int32, copy=False),
            offsets=_running([len(text.input_ids) for text in kept]),
            spans=np.array([span for text in kept for span in text.spans], dtype=np.int32),
            span_offsets=_running([len(text.spans) for text in kept]),
            temperatures=np.array([text.temperature for text in kept], dtype=np.float32),
            skipped=skipped,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text, int64 [texts]."""
        return np.diff(self.offsets)

    def input_ids(self, index: int) -> np.ndarray:
        """Token ids of one text, int32."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def answers(self, index: int) -> list[tuple[int, int]]:
        """Spans of one text that the target generated."""
        first, last = self.span_offsets[index : index + 2]
        return [(int(start), int(end)) for start, end in self.spans[first:last]]

    def each(self) -> Iterator[Text]:
        """The conversations one by one."""
        for i in range(len(self)):
            spans, temperature = tuple(self.answers(i)), float(self.temperatures[i])
            yield Text(int(self.ids[i]), self.input_ids(i), spans, temperature)

    def anchors(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Every anchor of a text and the end of the answer it drafts in, int64 each."""
        positions, ends = [], []
        for start, end in self.answers(index):
            positions.append(np.arange(max(start - 1, 0), end - BONUS_AND_LABEL))
            ends.append(np.full(len(positions[-1]), end))
        return np.concatenate(positions), np.concatenate(ends)


def split(texts: Texts, share: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training part and of at most `limit` held-out texts.

    Whether a text is held out depends on its id and the share alone. So it stays out of training
    when data is added, when a head is trained on with another seed, and heads of several seeds are
    measured on the same texts. Greedy texts come first among the held out: acceptance is exact on
    them.
    """
    held_out = held_out_texts(texts, share)
    train = np.setdiff1d(np.arange(len(texts)), held_out)
    if not len(train):
        raise SpecFormerError(
            f"--eval-share {share} leaves none of the {len(texts)} texts to train on", "lower it"
        )
    greedy = held_out[texts.temperatures[held_out] == 0]
    chosen = greedy if len(greedy) else held_out
    return train, chosen[np.argsort(_draw(texts.ids[chosen]), kind="stable")][:limit]


def held_out_texts(texts: Texts, share: float) -> np.ndarray:
    """Indices of the texts that a training with this share does not see."""
    draws = _draw(texts.ids)
    held_out = np.flatnonzero(draws < share)
    if share and not len(held_out):
        held_out = np.array([int(draws.argmin())])
    return held_out


def read_texts(tables: Iterable[pa.Table]) -> Iterator[Text]:
    """The conversations of shards (see `vllm_specformer.data.shards`), one table after another."""
    for table in tables:
        ids = table["id"].to_numpy()
        temperatures = table["temperature"].to_numpy()
        tokens, starts, ends = (
            _lists(table[name]) for name in ("input_ids", "answer_starts", "answer_ends")
        )
        for row in range(len(table)):
            spans = zip(starts[row].tolist(), ends[row].tolist(), strict=True)
            yield Text(int(ids[row]), tokens[row], tuple(spans), float(temperatures[row]))


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of lists as one array per row, without a Python object per element."""
    values = column.combine_chunks()
    return np.split(values.flatten().to_numpy(), np.cumsum(values.value_lengths())[:-1])


def _draw(ids: np.ndarray) -> np.ndarray:
    """A number from 0 to 1 for each id: splitmix64, counter-based, so ids do not depend on others.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    first = np.random.SeedSequence((0, 3)).generate_state(1, np.uint64)
    x = first + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


def _count(start: int, end: int) -> int:
    return max(0, end - BONUS_AND_LABEL - max(start - 1, 0))


def _running(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
