"""Which rows of a step the CPU proposer stores."""

from __future__ import annotations

import pytest
import torch

from vllm_specformer.engine.proposer_v1 import accepted_rows

# Scheduled rows of each request, and how many of them are rejected drafts.
STEPS = {
    "one request": ([5], [2]),
    "all accepted": ([5, 5], [0, 0]),
    "all rejected": ([5, 3], [4, 2]),
    "beside a prompt": ([5, 40, 1, 5], [3, 0, 0, 1]),
    "the last accepts all": ([5, 5, 5], [4, 1, 0]),
}


@pytest.mark.parametrize(("counts", "rejected"), STEPS.values(), ids=STEPS)
def test_rows_of_rejected_drafts_are_left_out(counts: list[int], rejected: list[int]) -> None:
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    last = starts[1:] - 1 - torch.tensor(rejected, dtype=torch.int32)
    rows, kept_last = accepted_rows(starts, last)
    expected = [
        start + row
        for start, count, left_out in zip(starts.tolist(), counts, rejected, strict=False)
        for row in range(count - left_out)
    ]
    assert rows.tolist() == expected
    assert rows[kept_last].tolist() == last.tolist()
