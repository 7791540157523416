"""Requests of the V2 runner whose drafts are the best tokens among drawn ones."""

from __future__ import annotations

import numpy as np
import torch
from vllm import SamplingParams

from vllm_specformer.engine.draws.batch_v2 import BestRows, keep_best

CPU = torch.device("cpu")


def found(rows: BestRows, *states: int) -> list[bool] | None:
    of_batch = rows.of(np.array(states), torch.tensor(states, dtype=torch.int32))
    return None if of_batch is None else of_batch.tolist()


def test_a_state_row_has_the_wish_of_its_last_tenant() -> None:
    rows = BestRows(4, CPU)
    assert found(rows, 0, 1, 2, 3) is None
    rows.add_request(2, SamplingParams(temperature=1, top_k=1))
    rows.add_request(1, SamplingParams(temperature=1))
    assert found(rows, 2, 0, 1) == [True, False, False]
    assert found(rows, 3, 1) is None
    rows.add_request(2, SamplingParams(temperature=1))
    assert found(rows, 2, 0, 1) is None
    rows.add_request(0, SamplingParams(temperature=1, top_k=1))
    assert found(rows, 2, 0) == [False, True]


def test_best_logits_alone_are_kept() -> None:
    """The first of equal ones, request by request."""
    logits = torch.randn(6, 9)
    logits[2, 3] = logits[2, 7] = 10.0
    before = logits.clone()
    kept = keep_best(logits, torch.tensor([False, True, False]))
    assert torch.equal(logits, before)
    assert torch.equal(kept[[0, 1, 4, 5]], logits[[0, 1, 4, 5]])
    assert kept[2].isfinite().nonzero().tolist() == [[3]]
    assert kept[2:4].isfinite().sum(-1).tolist() == [1, 1]
    assert torch.equal(kept[2:4].amax(-1), logits[2:4].amax(-1))
