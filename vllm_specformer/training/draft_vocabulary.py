"""Which tokens a head scores, when it is not to score all: those its target writes most often."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.training.texts import Texts

# Of a slot's work; and of the answers' tokens that a draft vocabulary ought to make up.
DOMINANT, ENOUGH = 0.5, 0.97


def choose_tokens(
    texts: Texts, indices: np.ndarray, size: int, vocab_size: int, always: Iterable[int]
) -> np.ndarray:
    """The `size` most frequent tokens of the answers of some texts, and those of `always`.

    Of tokens that are equally frequent the lower id wins, so the same data give the same choice.

    Args:
        indices: of the texts, int64.
        always: tokens that end an answer; a head that cannot draft them would miss every end.

    Returns:
        int64 [size], increasing.

    Raises:
        SpecFormerError: `always` alone are more than `size`.
    """
    counts = _counts(texts, indices, vocab_size)
    kept = sorted(token for token in set(always) if token < vocab_size)
    if len(kept) > size:
        raise SpecFormerError(
            f"--draft-vocab {size}: the target has {len(kept)} tokens that end an answer, which "
            "are always part of it",
            "choose a larger number, as a rule some thousands",
        )
    counts[kept] = counts.sum() + 1
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def coverage(texts: Texts, indices: np.ndarray, token_ids: np.ndarray, vocab_size: int) -> float:
    """Share of the answers' tokens that are among `token_ids`: no draft hits any other."""
    counts = _counts(texts, indices, vocab_size)
    return float(counts[token_ids].sum() / max(1, counts.sum()))


def suggestion(texts: Texts, indices: np.ndarray, config: SpecFormerConfig) -> list[str]:
    """A line that proposes a draft vocabulary, where scoring all tokens dominates a slot's work.

    The smallest power of two whose tokens, chosen by one half of the texts, cover `ENOUGH` of the
    other half's answers; none where it would save little, or where the texts are too few to tell.
    """
    size = config.hidden_size
    layer = 4 * size * size + 3 * size * config.intermediate_size
    scoring = size * config.vocab_size
    share = scoring / (scoring + config.num_slot_layers * layer)
    chosen_by, judged_by = (
        _counts(texts, indices[first::2], config.vocab_size) for first in (0, 1)
    )
    counts = judged_by[np.argsort(-chosen_by, kind="stable")]
    covered = np.cumsum(counts) / max(1, counts.sum())
    needed = int(np.searchsorted(covered, ENOUGH)) + 1
    proposed = 1 << (needed - 1).bit_length()
    too_few = needed > np.count_nonzero(chosen_by)  # the rest of them is in no order
    if share < DOMINANT or too_few or proposed > config.vocab_size // 2:
        return []
    return [
        f"note: scoring all {config.vocab_size:,} tokens is {share:.0%} of a slot's work; "
        f"--draft-vocab {proposed} would score a part that makes up "
        f"{covered[proposed - 1]:.1%} of answers like these"
    ]


def _counts(texts: Texts, indices: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token stands in the answers, int64 [vocab_size]."""
    answers = [
        texts.input_ids(index)[start:end]
        for index in indices.tolist()
        for start, end in texts.answers(index)
    ]
    written = np.concatenate([np.zeros(0, dtype=np.int32), *answers])
    return np.bincount(written, minlength=vocab_size)
