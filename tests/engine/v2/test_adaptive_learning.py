"""vLLM's estimator is what benchmarks/slot_chances.py takes it for."""

from __future__ import annotations

import numpy as np
import pytest
import slot_chances
import torch
from slot_chances import Estimator
from vllm.v1.worker.gpu.spec_decode.acceptance_estimator import OnlineAcceptanceEstimator

from vllm_specformer.calibration import largest_log_odds

K, REQUESTS, STEPS = 3, 5, 12


def test_our_replay_learns_as_vllms_kernels_do() -> None:
    """The same verdicts, two rounds of them."""
    rng = np.random.default_rng(0)
    theirs = OnlineAcceptanceEstimator(REQUESTS, K, torch.device("cpu"))
    theirs.REFIT_INTERVAL = STEPS  # type: ignore[misc]
    ours = Estimator(K)
    assert (float(theirs.slope), *theirs.intercepts.tolist()) == pytest.approx(
        (ours.slope, *ours.intercepts)
    )
    assert OnlineAcceptanceEstimator.REFIT_INTERVAL == slot_chances.INTERVAL
    rows, vocabulary = torch.arange(REQUESTS), 50
    for round_ in range(2):
        seen: list[tuple[int, float, float]] = []
        for _ in range(STEPS):
            logits = torch.from_numpy(rng.normal(size=(REQUESTS * K, vocabulary)) * 3).float()
            theirs.predict(
                logits,
                rows.repeat_interleave(K),
                torch.arange(K, dtype=torch.int32).repeat(REQUESTS),
                torch.zeros(REQUESTS, K),
                torch.ones(REQUESTS),
            )
            features = largest_log_odds(logits).view(REQUESTS, K)
            assert torch.allclose(theirs.features, features, atol=1e-4)
            admitted = rng.integers(0, K + 1, size=REQUESTS)
            accepted = np.array([rng.integers(0, n + 1) for n in admitted])
            for row in range(REQUESTS):
                for slot in range(min(accepted[row] + 1, admitted[row])):
                    seen.append((slot, float(features[row, slot]), float(slot < accepted[row])))
            theirs.step(rows, torch.from_numpy(accepted + 1), torch.from_numpy(admitted - accepted))
        assert theirs._refits == round_ + 1
        slot, feature, label = np.array(seen).T
        ours.refit(slot.astype(np.int64), feature, label)
        assert float(theirs.slope) == pytest.approx(ours.slope, rel=1e-3)
        assert theirs.intercepts.tolist() == pytest.approx(ours.intercepts, rel=1e-3, abs=1e-4)
