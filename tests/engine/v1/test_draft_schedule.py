"""`num_speculative_tokens_per_batch_size`: the number of drafts follows the size of the batch."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.sample.rejection_sampler import RejectionSampler

from support.dense import DenseReference
from support.drafts import compare, truth, watching
from support.engines import Job, drafting, engine, greedy, prompts, run_plain
from support.heads import make_head
from support.outputs import continuations, token_ids
from vllm_specformer.engine import proposer_v1

TEXTS = prompts()[:12]
Schedule = list[tuple[int, int, int]]


class Both:
    """True for three times, then False for three times, and so on; `asked` counts both."""

    def __init__(self) -> None:
        self._turns = cycle([True] * 3 + [False] * 3)
        self.asked = {True: 0, False: 0}

    def __bool__(self) -> bool:
        turn = next(self._turns)
        self.asked[turn] += 1
        return turn


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param([(1, 3, 4), (4, 8, 2), (9, 64, 1)], id="down-to-one", marks=pytest.mark.slow),
        pytest.param([(1, 5, 3), (6, 64, 0)], id="down-to-none"),
    ],
)
def test_number_of_drafts_by_batch_size(
    tmp_path: Path, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests finish one by one, so the batch passes through every range, K = 0 included.

    A step without drafts must store K/V all the same: later drafts show whether it did. Some of
    these steps store at once, the others leave it to the next step, as in a worker process that was
    not asked in between. Nothing is verified in them.
    """
    stores_late = Both()
    monkeypatch.setattr(proposer_v1, "has_time_between_steps", lambda config: stores_late)
    verify, verified = RejectionSampler.forward, []

    def forward(self: Any, metadata: Any, *args: Any) -> Any:
        verified.append(list(metadata.num_draft_tokens))
        return verify(self, metadata, *args)

    monkeypatch.setattr(RejectionSampler, "forward", forward)
    answers = run_plain({"all": Job(TEXTS, greedy(64, ignore_eos=True))})["all"]
    lengths = [4 + 4 * i for i in range(len(TEXTS))]
    params = [greedy(n, ignore_eos=True) for n in lengths]
    head = make_head(tmp_path / "head", "default")
    speculative = drafting(4, head, num_speculative_tokens_per_batch_size=schedule)
    with engine(speculative) as llm, watching(truth(continuations(answers))) as watch:
        found = token_ids(Job(TEXTS, params).run(llm))
    assert found == [[ids[0][:n]] for ids, n in zip(token_ids(answers), lengths, strict=True)]
    assert verified
    assert all(map(any, verified))
    assert {k for _, k in watch.batch_sizes} == {k for _, _, k in schedule}
    for requests, k in watch.batch_sizes:
        assert k == next(n for low, high, n in schedule if low <= requests <= high)
    result = compare(DenseReference(head), watch.drafted)
    assert result.wrong == []
    assert result.compared > 50
    if schedule[-1][-1] == 0:
        assert min(stores_late.asked.values()) >= 6
