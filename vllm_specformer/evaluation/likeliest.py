"""What of the accepted drafts is kept if only the likeliest drafts are verified.

Adaptive verification gives a step's rows to those drafts of the batch that are likeliest to be
accepted. Over many steps that is a curve: of all drafts this share verified, of all accepted drafts
that share kept. `specformer plan` takes what a row costs from elsewhere and finds where to stop.
"""

from __future__ import annotations

import numpy as np

from vllm_specformer.calibration import Calibration
from vllm_specformer.evaluation.calibrate import Observed, chances_of

PARTS = 16  # of the drafts, from none to all


def kept_of_likeliest(seen: Observed, calibration: Calibration, slots: int) -> list[float]:
    """Share of accepted drafts among the likeliest 0, 1/16, ... 1 of all drafts.

    Args:
        seen: drafts of steps with at most so many slots.
        calibration: by which vLLM ranks them, the product over a draft and those before it.
    """
    _, step = np.unique(seen.step, return_inverse=True)
    shape = (int(step.max()) + 1, slots)
    chance, accepted, is_there = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)
    chance[step, seen.slot] = chances_of(calibration, seen)
    accepted[step, seen.slot] = seen.weight * seen.chance
    is_there[step, seen.slot] = True
    survival, gains = np.cumprod(chance, axis=1)[is_there], accepted[is_there]
    reached = np.concatenate([[0.0], np.cumsum(gains[np.argsort(-survival, kind="stable")])])
    places = np.arange(PARTS + 1) / PARTS * len(gains)
    found = np.interp(places, np.arange(len(reached)), reached) / max(reached[-1], 1e-9)
    return [round(float(share), 4) for share in found]
