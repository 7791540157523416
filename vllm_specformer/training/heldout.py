"""Acceptance on held-out texts while a head trains: replayed exactly, several texts at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_specformer.target.ends import TargetEnds
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.acceptance import Acceptance
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import DEFAULT_MEMORY, PackedHead
from vllm_specformer.training.packing import Batch, collate
from vllm_specformer.training.texts import Texts

# Lays a batch's tensors out as rows with the target's states.
MakeRows = Callable[[dict[str, Tensor], Batch], HookedRows]


@dataclass
class Evaluation:
    """Counts over texts, for several numbers of drafted tokens; they add up over processes."""

    budgets: tuple[int, ...]
    acceptance: dict[int, Acceptance] = field(default_factory=dict)
    loss_sums: list[float] = field(default_factory=list)
    label_counts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.acceptance = {k: Acceptance(k) for k in self.budgets}
        self.loss_sums = [0.0] * max(self.budgets)
        self.label_counts = [0.0] * max(self.budgets)

    @property
    def slot_losses(self) -> list[float]:
        """Cross entropy of each slot, nats; NaN for one that never has a label."""
        pairs = zip(self.loss_sums, self.label_counts, strict=True)
        return [total / count if count else math.nan for total, count in pairs]

    def to_tensor(self) -> Tensor:
        """All counts in a row, float64, for a sum over processes."""
        values = [*self.loss_sums, *self.label_counts]
        for a in self.acceptance.values():
            values += [a.steps, a.tokens, *a.accepted, *a.offered]
        return torch.tensor(values, dtype=torch.float64)

    def set_from(self, counts: Tensor) -> None:
        """The reverse of `to_tensor`."""
        values = iter(counts.tolist())
        self.loss_sums = [next(values) for _ in self.loss_sums]
        self.label_counts = [next(values) for _ in self.label_counts]
        for a in self.acceptance.values():
            a.steps, a.tokens = round(next(values)), round(next(values))
            a.accepted = [round(next(values)) for _ in a.accepted]
            a.offered = [round(next(values)) for _ in a.offered]


def evaluation_budgets(slots: int) -> tuple[int, ...]:
    """Numbers of drafted tokens that are evaluated: 4, which is what is served as a rule, and K."""
    return tuple(sorted({min(4, slots), slots}))


@torch.no_grad()
def evaluate(
    head: PackedHead,
    target: TargetEnds,
    texts: Texts,
    batches: Iterable[Batch],
    make_rows: MakeRows,
    memory: int = DEFAULT_MEMORY,
) -> Evaluation:
    """Replay the answers of all texts with the drafts of the head."""
    result = Evaluation(evaluation_budgets(head.config.num_draft_slots))
    for batch in batches:
        rows = make_rows(collate(texts, batch, None, None), batch)
        for budget, acceptance in result.acceptance.items():
            drafts, losses, counts = head.drafts(rows, target, budget, memory)
            if budget == max(result.budgets):
                for slot in range(budget):
                    result.loss_sums[slot] += float(losses[slot])
                    result.label_counts[slot] += float(counts[slot])
            for number, row in enumerate(batch):
                _replay(texts, row, drafts[number].cpu().numpy(), acceptance)
    return result


def _replay(texts: Texts, row: Sequence[int], drafts: np.ndarray, acceptance: Acceptance) -> None:
    """Walk through the answers of a row's texts; `drafts` [A, n] are at all anchors, in order."""
    for index, at in drafts_by_text(texts, row, drafts):
        tokens = texts.input_ids(index).tolist()
        for start, end in texts.answers(index):
            # At an answer's last token but one there is nothing left to draft, hence no anchor.
            acceptance.walk(tokens[:end], start, partial(drafts_at, at))


def drafts_by_text(
    texts: Texts, row: Sequence[int], drafts: np.ndarray
) -> Iterator[tuple[int, dict[int, list[Any]]]]:
    """Index of each text of a row, and its drafts by position; `drafts` as for `_replay`.

    Or anything else that there is of drafts at all anchors.
    """
    first = 0
    for index in row:
        anchors, _ = texts.anchors(index)
        made = drafts[first : first + len(anchors)].tolist()
        first += len(anchors)
        yield index, {int(anchor): draft for anchor, draft in zip(anchors, made, strict=True)}


def drafts_at(drafts: dict[int, list[int]], position: int) -> list[int]:
    """What was drafted at a position, if it is an anchor."""
    return drafts.get(position, [])


def run_target(target: HookedTarget, fields: dict[str, Tensor], packed: bool) -> HookedRows:
    """The rows of a batch, on the target's device, with the target's states."""
    fields = {name: value.to(target.device) for name, value in fields.items()}
    states, last = target(fields["input_ids"], fields["position_ids"] if packed else None)
    return HookedRows(states, last, **fields)
