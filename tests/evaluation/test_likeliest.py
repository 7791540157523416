"""What the likeliest drafts keep."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specformer.calibration import Calibration
from vllm_specformer.evaluation.calibrate import Observed
from vllm_specformer.evaluation.likeliest import PARTS, kept_of_likeliest


def observed(sure: list[list[float]], accepted: list[list[float]]) -> Observed:
    """Steps of drafts with these largest probabilities, out of order, once each accepted or not."""
    rows = [
        (slot, np.log(q / (1 - q)), chance, float(np.prod(accepted[step][:slot])), step, step)
        for step, own in enumerate(sure)
        for slot, (q, chance) in enumerate(zip(own, accepted[step], strict=True))
    ][::-1]
    slot, odds, chance, weight, step, text = np.array(rows).T
    whole = [values.astype(np.int64) for values in (slot, step, text)]
    return Observed(whole[0], odds, chance, weight, whole[1], whole[2])


def test_the_likeliest_come_first() -> None:
    """Survival ranks: 0.9 and 0.81 of the first step, 0.5 and 0.45 of the second."""
    seen = observed([[0.9, 0.9], [0.5, 0.9]], [[1.0, 1.0], [1.0, 0.0]])
    kept = kept_of_likeliest(seen, Calibration.none(2), 2)
    assert len(kept) == PARTS + 1
    quarters = kept[:: PARTS // 4]
    assert quarters == pytest.approx([0, 1 / 3, 2 / 3, 1, 1], abs=1e-3)


def test_a_calibration_ranks() -> None:
    """One that thinks nothing of second drafts takes the other step's first before them."""
    seen = observed([[0.9, 0.9], [0.5, 0.9]], [[1.0, 0.0], [1.0, 1.0]])
    doubtful = Calibration(1.0, (0.0, -5.0))
    assert kept_of_likeliest(seen, doubtful, 2)[PARTS // 2] == pytest.approx(2 / 3, abs=1e-3)
    assert kept_of_likeliest(seen, Calibration.none(2), 2)[PARTS // 2] == pytest.approx(
        1 / 3, abs=1e-3
    )


def test_steps_at_an_answers_end_have_fewer_drafts() -> None:
    seen = observed([[0.9, 0.9], [0.8]], [[1.0, 1.0], [0.0]])
    kept = kept_of_likeliest(seen, Calibration.none(2), 2)
    assert kept[-1] == 1
    assert kept == sorted(kept)
