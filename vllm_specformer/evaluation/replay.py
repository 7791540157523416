"""Acceptance of a head, and of what needs no head, replayed on texts the target has written.

Why a replay is exact: verification is lossless, and these drafts are deterministic. So a draft is
accepted if and only if it equals the token that the text continues with. At temperature 0 that is
the definition. At other temperatures rejection sampling accepts draft `x` with probability p(x) and
otherwise emits a token that is NOT x; coupled verification emits a token that does not depend on
the draft and accepts x if they are equal. Under either rule the text has the target's distribution
and decides what was accepted, so on sampled texts too the replay gives just the steps that serving
would have taken to write them.

Sampled requests get drafts that are drawn, unless the user asks for others. Of those the text tells
how probably each was accepted (`PackedHead.chances`), and the replay gives the expected steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vllm_specformer.evaluation.trees import BATCH_TOKENS as _BATCH_TOKENS
from vllm_specformer.evaluation.trees import TreeReplay
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.acceptance import Acceptance, Drafter, Lookup, repeated_fraction
from vllm_specformer.training.heldout import drafts_at, drafts_by_text, run_target
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import DEFAULT_MEMORY, PackedHead
from vllm_specformer.training.packing import Batch, Budget, collate, plan_all
from vllm_specformer.training.texts import Texts

HEAD, LOOKUP_3, LOOKUP_2_3, BOUND = "head", "lookup_3", "lookup_2_3", "bound"
DRAWN = "head_drawn"  # of sampled texts: drafts that are drawn from the head, as served
LOOKUPS = (LOOKUP_3, LOOKUP_2_3)

# Changes the rows before the head sees them; see `causes.py`.
Alter = Callable[[HookedRows], HookedRows]


@dataclass
class DraftedText:
    """One text with all that can be drafted in it.

    Attributes:
        id: number of the prompt.
        tokens: prompt and answers.
        answers: half-open spans of the answers.
        temperature: at which they were drawn.
        drafts: number of drafted tokens K -> position -> the head's K best drafts there.
        best: the target's most probable token after every position.
        chances: as `drafts`: how probably the text's tokens came of drawn drafts; sampled texts.
        accepted: nodes of a tree -> position -> drafts accepted of the tree drafted there.
    """

    id: int
    tokens: list[int]
    answers: list[tuple[int, int]]
    temperature: float
    drafts: dict[int, dict[int, list[int]]]
    best: list[int]
    chances: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    accepted: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def repeated(self) -> float:
        """Share of repeated 4-grams in the answers."""
        shares = [repeated_fraction(self.tokens[start:end]) for start, end in self.answers]
        return sum(shares) / len(shares)

    def drafter(self, method: str, count: int) -> Drafter:
        """Something that drafts `count` tokens by one of the methods above."""
        if method == HEAD:
            return partial(drafts_at, self.drafts[count])
        if method == BOUND:
            return lambda position: self.best[position + 1 : position + 1 + count]
        lookup = Lookup(self.tokens, 3, 3 if method == LOOKUP_3 else 2)
        return lambda position: lookup.drafts(position + 2, count)


@torch.no_grad()
def draft_texts(
    head: PackedHead,
    target: HookedTarget,
    texts: Texts,
    budgets: Sequence[int],
    packed: bool,
    memory: int = DEFAULT_MEMORY,
    alter: Alter | None = None,
    trees: TreeReplay | None = None,
) -> Iterator[DraftedText]:
    """Let the head draft at every anchor of every text, for several numbers of drafted tokens.

    A head whose passes differ with that number runs once for each, the others once. With `trees`
    all texts are of one temperature.
    """
    by_slots: dict[int, list[int]] = {}
    for budget in budgets:
        by_slots.setdefault(head.slots_to_run(budget), []).append(budget)
    for batch in plan_all(texts.lengths, Budget(_BATCH_TOKENS, packed=packed)):
        rows = run_target(target, collate(texts, batch, None, None), packed)
        best = _best_tokens(target, rows.last_states, memory).cpu()
        rows = rows if alter is None else alter(rows)
        made = {
            sharing[-1]: head.drafts(rows, target, max(sharing), memory)[0].cpu().numpy()
            for sharing in by_slots.values()
        }
        drawn = _drawn(head, target, rows, texts, batch, by_slots, memory)
        of_trees = None
        if trees is not None:
            temperature = float(texts.temperatures[batch[0][0]])
            of_trees = trees.accepted(head, target, rows, temperature, memory).cpu().numpy()
        for number, row in enumerate(batch):
            reached = {} if of_trees is None else dict(drafts_by_text(texts, row, of_trees[number]))
            found = {
                budget: dict(drafts_by_text(texts, row, made[sharing[-1]][number, :, :budget]))
                for sharing in by_slots.values()
                for budget in sharing
            }
            chances = {
                budget: dict(drafts_by_text(texts, row, drawn[sharing[-1]][number, :, :budget]))
                for sharing in by_slots.values()
                for budget in sharing
                if drawn
            }
            start = 0
            for index in row:
                tokens = texts.input_ids(index).tolist()
                yield DraftedText(
                    id=int(texts.ids[index]),
                    tokens=tokens,
                    answers=texts.answers(index),
                    temperature=float(texts.temperatures[index]),
                    drafts={budget: found[budget][index] for budget in budgets},
                    best=best[number, start : start + len(tokens)].tolist(),
                    chances={budget: at[index] for budget, at in chances.items()},
                    accepted={
                        nodes: {at: counts[place] for at, counts in reached[index].items()}
                        for place, nodes in enumerate(trees.nodes if trees else ())
                    },
                )
                start += len(tokens)


def _drawn(
    head: PackedHead,
    target: HookedTarget,
    rows: HookedRows,
    texts: Texts,
    batch: Batch,
    by_slots: dict[int, list[int]],
    memory: int,
) -> dict[int, np.ndarray]:
    """Chances of drawn drafts by the largest of budgets that share a pass; empty if all is greedy.

    Float64 [rows, A, budget].
    """
    temperatures = {round(float(texts.temperatures[i]), 4) for row in batch for i in row}
    if temperatures == {0.0}:
        return {}
    (temperature,) = temperatures  # the texts of an evaluation are grouped by it
    return {
        sharing[-1]: head.chances(rows, target, max(sharing), temperature, memory)
        .double()
        .cpu()
        .numpy()
        for sharing in by_slots.values()
    }


def _best_tokens(target: HookedTarget, states: Tensor, memory: int) -> Tensor:
    """Most probable next tokens of states behind the final norm: [rows, T, H] -> [rows, T]."""
    flat = states.flatten(0, 1)
    vocabulary = target.target.get_output_embeddings().weight.shape[0]
    size = max(1, memory // (8 * vocabulary))
    best = [target.lm_head(part).argmax(-1) for part in flat.split(size)]
    return torch.cat(best).view(states.shape[:2])


def replay(texts: Iterable[DraftedText], method: str, count: int) -> Acceptance:
    """Acceptance of one method over all answers, `count` tokens being drafted per step."""
    acceptance = Acceptance(count)
    for text in texts:
        if method == DRAWN:
            for start, end in text.answers:
                acceptance.expect(end, start, partial(_at, text.chances[count]))
            continue
        drafter = text.drafter(method, count)
        for start, end in text.answers:
            acceptance.walk(text.tokens[:end], start, drafter)
    return acceptance


def _at(chances: dict[int, list[float]], position: int) -> list[float]:
    return chances.get(position, [])


def replay_tree(text: DraftedText, nodes: int, slots: int) -> Acceptance:
    """Acceptance of trees of so many nodes over a text's answers, by depth."""
    acceptance = Acceptance(slots)
    for start, end in text.answers:
        position = start - 1
        while position + 1 < end:
            # At an answer's last token there is nothing left to draft, hence no anchor.
            reached = text.accepted[nodes].get(position, 0)
            room = min(slots, end - position - 2)
            for depth in range(room):
                acceptance.offered[depth] += 1
                acceptance.accepted[depth] += depth < reached
            acceptance.steps += 1
            acceptance.tokens += reached + 1
            position += reached + 1
    return acceptance


def less_repetitive_half(texts: Sequence[DraftedText]) -> list[DraftedText]:
    """The half of the texts whose answers repeat themselves least, at least one."""
    ranked = sorted(texts, key=lambda text: text.repeated)
    return ranked[: max(1, len(ranked) // 2)]
