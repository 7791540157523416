"""Which tokens a head scores, when it is not to score all: those its target writes most often."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.training.texts import Texts


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


def _counts(texts: Texts, indices: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token stands in the answers, int64 [vocab_size]."""
    answers = [
        texts.input_ids(index)[start:end]
        for index in indices.tolist()
        for start, end in texts.answers(index)
    ]
    written = np.concatenate([np.zeros(0, dtype=np.int32), *answers])
    return np.bincount(written, minlength=vocab_size)
