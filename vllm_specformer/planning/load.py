"""What a plan's costs make of a whole load: requests come, are read, answered and leave.

`PlanRow.ratio` is about steps that only decode, at one batch size. A measured run reads prompts
too, which no way of decoding makes faster, and its last answers end in batches smaller than its
concurrency. Here the same costs run through the whole of it: the steps of an engine that is given
the next request as soon as one leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_specformer.planning.choose import PlanRow, between


def seconds_under_load(
    rows: Sequence[PlanRow],
    answers: Sequence[int],
    concurrency: int,
    count_at: Callable[[int], int] | None,
) -> float:
    """Expected seconds from the first request to the last answer.

    Every request gains the mean number of tokens in every step. A step that reads prompts also
    decodes for those who are past theirs; it takes the sum of both.

    Args:
        answers: tokens of each answer, in the order of the requests; the first comes with the
            prompt's own step.
        concurrency: requests that the clients keep running.
        count_at: drafted tokens by batch size; None for a server without speculation.
    """
    costs = _Costs(rows, count_at)
    waiting, running, seconds = list(reversed(answers)), list[float](), 0.0
    while waiting or running:
        new = min(concurrency - len(running), len(waiting))
        gain, step = costs.step(len(running)) if running else (0.0, 0.0)
        seconds += step + costs.prompts(new, beside=bool(running))
        running = [left - gain for left in running if left > gain]
        running += [left for _ in range(new) if (left := waiting.pop() - 1.0) > 0]
    return seconds


class _Costs:
    """A plan's rows by batch size, with or without speculation; looked up once each."""

    def __init__(self, rows: Sequence[PlanRow], count_at: Callable[[int], int] | None) -> None:
        self.rows, self.count_at = rows, count_at
        self.largest = max(row.batch for row in rows)
        self._at: dict[int, PlanRow] = {}

    def step(self, batch: int) -> tuple[float, float]:
        """Tokens that each request gains in a step, and its seconds."""
        row = self._row(batch)
        return (1.0, row.plain) if self.count_at is None else (row.tokens_per_step, row.step)

    def prompts(self, new: int, *, beside: bool) -> float:
        """Seconds of reading that many prompts.

        Beside other work the weights are read anyway, so only the prompt's own rows count, which is
        what it costs among many.
        """
        if not new:
            return 0.0
        row = self._row(self.largest if beside else new)
        return new * (row.plain_prompt if self.count_at is None else row.prompt)

    def _row(self, batch: int) -> PlanRow:
        if batch not in self._at:
            found = between(self.rows, batch)
            # What a server without speculation takes stands in the rows of every count.
            count = found[0].count if self.count_at is None else self.count_at(batch)
            self._at[batch] = next(row for row in found if row.count == count)
        return self._at[batch]
