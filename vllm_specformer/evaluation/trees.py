"""What trees would have had accepted on known texts, and the temperatures their nodes rank by.

A tree is verified by the token that the target emits at every node that is visited: greedily, or
sampled with the target's own noise ("coupled"). Either way the text does not depend on the tree,
and on a known text it is followed down as far as it has the text's next token. At temperature 0
that is all. Above it the head drafts with the noise that the target has sampled the text with,
which is not known: any noise that fits the text is as likely as its density says. So it is drawn
from its distribution given the text, once for every place of a text, and steps then have the
distribution that serving would give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from specformer_kernels.noise import Stream, gumbel
from specformer_kernels.select_tree import Tree, select_tree
from torch import Tensor

from vllm_specformer.candidates import BEAM, Ranking, draft_lists
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import DEFAULT_MEMORY, PackedHead
from vllm_specformer.training.packing import Budget, collate, plan_all
from vllm_specformer.training.slot_loss import IGNORED
from vllm_specformer.training.texts import Texts

BATCH_TOKENS = 4096
# Ranking temperatures that are tried.
GRID = tuple(round(0.3 * 1.08**step, 3) for step in range(33))  # to 3.5
# Numbers of 4 bytes per scored token and anchor beside the slots' logits: scores of a beam's rows,
# their exponentials, noise and the target's logits.
_WORKSPACE = 4 * BEAM + 8


@dataclass(frozen=True)
class TreeReplay:
    """How trees are to be replayed.

    Attributes:
        nodes: drafted nodes of each tree.
        seed: of the noise of sampled texts.
        ranking: in place of the head's own.
    """

    nodes: tuple[int, ...]
    seed: int = 0
    ranking: Ranking | None = None

    def accepted(
        self,
        head: PackedHead,
        target: HookedTarget,
        rows: HookedRows,
        temperature: float,
        memory: int = DEFAULT_MEMORY,
    ) -> Tensor:
        """Drafts accepted at every anchor by a tree of each size: int64 [rows, A, sizes].

        A tree of n nodes is drafted from as many slots as the engine would run, min(n, K).
        """
        slots = head.config.num_draft_slots
        ranking = self.ranking or Ranking.of(head.config)
        # The scores have the texts' noise already, so they are drafted from as greedy ones.
        ranking = Ranking(*[ranking.sampled if temperature > 0 else ranking.greedy] * 2)
        by_slots: dict[int, list[int]] = {}
        for index, nodes in enumerate(self.nodes):
            by_slots.setdefault(min(nodes, slots), []).append(index)
        found = torch.zeros(
            (*rows.anchors.shape, len(self.nodes)), dtype=torch.int64, device=rows.anchors.device
        )
        for wanted, sizes in by_slots.items():
            for part in scored_parts(head, target, rows, wanted, temperature, self.seed, memory):
                shape = part.labels.shape[:2]
                lists = draft_lists(
                    head,
                    part.scores.flatten(0, 1),
                    part.bonus_tokens.flatten(),
                    gates=None if part.gates is None else part.gates.flatten(0, 1),
                    ranking=ranking,
                )
                for index in sizes:
                    tree = select_tree(*lists, self.nodes[index])
                    reached = followed(tree, part.labels.flatten(0, 1))
                    found[:, part.anchors, index] = reached.view(shape)
        return found


def followed(tree: Tree, continuation: Tensor) -> Tensor:
    """How deep each tree has a text's next tokens, int64 [R, n] (`IGNORED` at its end): [R]."""
    places = (tree.depths.long() - 1).clamp(min=0)
    parents = tree.parents.long()
    matches = (tree.tokens >= 0) & (tree.tokens == continuation.gather(1, places))
    root = torch.zeros_like(matches)
    root[:, 0] = True
    reached = root
    for _ in range(continuation.shape[1]):
        reached = root | (matches & reached.gather(1, parents))
    return (tree.depths * reached).amax(1).long()


@dataclass(frozen=True)
class ScoredPart:
    """Some anchors of packed rows.

    `anchors` which; `scores` float32 [rows, part, n, N], the slots' logits before the Markov term,
    at a temperature T above 0 with T times the target's noise; `bonus_tokens` int64 [rows, part];
    `labels` int64 [rows, part, n], the text's tokens, `IGNORED` past an answer's end; `gates`
    [rows, part, n, rank] of the Markov term, if the head has them.
    """

    anchors: slice
    scores: Tensor
    bonus_tokens: Tensor
    labels: Tensor
    gates: Tensor | None

    def gate(self, slot: int) -> Tensor | None:
        """The gates of one slot, [rows, part, rank]."""
        return None if self.gates is None else self.gates[:, :, slot]


@torch.no_grad()
def scored_parts(
    head: PackedHead,
    target: HookedTarget,
    rows: HookedRows,
    wanted: int,
    temperature: float,
    seed: int,
    memory: int = DEFAULT_MEMORY,
) -> Iterator[ScoredPart]:
    """Slot scores at all anchors, part by part; all texts were written at one temperature."""
    labels = rows.labels(wanted)
    context, running = head._context(rows), head.slots_to_run(wanted)
    held = (wanted + _WORKSPACE) * head.config.num_scored_tokens
    for part in head._parts(rows, running, held, memory):
        slots = head.slot_states(context, rows, target, part, running)[:, :, :wanted]
        normed = target.norm(slots)
        scores = head.scored(target.lm_head(normed)).float()
        if temperature > 0:
            noise = _noise_of_texts(head, target, rows, part, labels[:, part], temperature, seed)
            scores = scores + temperature * noise
        bonus, gates = rows.bonus_tokens[:, part], head.markov_gates(normed)
        yield ScoredPart(part, scores, bonus, labels[:, part], gates)


def _noise_of_texts(
    head: PackedHead,
    target: HookedTarget,
    rows: HookedRows,
    part: slice,
    labels: Tensor,
    temperature: float,
    seed: int,
) -> Tensor:
    """The target's noise at the slots of some anchors, given the text: [rows, part, n, N].

    It is keyed by row and place, so that all anchors that see a place see the same.
    """
    count, length = rows.input_ids.shape
    places = rows.anchors[:, part, None] + 1 + torch.arange(labels.shape[2], device=labels.device)
    places = places.clamp(max=length - 1)
    number = torch.arange(count, device=labels.device)[:, None, None] * length + places
    # One place may be inside an answer for one anchor and past its end for another.
    names, inverse = (2 * number + (labels != IGNORED)).unique(return_inverse=True)
    number, is_known = names // 2, names % 2 > 0
    logits = target.lm_head(rows.last_states.flatten(0, 1)[number]).float() / temperature
    following = rows.input_ids.flatten()[(number + 1).clamp(max=count * length - 1)]
    ids = head.draft_token_ids
    ids = torch.arange(logits.shape[1], device=labels.device) if ids is None else ids
    seeds = torch.full_like(number, seed)
    noise = noise_given(logits, following, seeds, number, ids)
    free = gumbel(seeds[:, None], number[:, None], ids, Stream.TARGET)
    return torch.where(is_known[:, None], noise, free)[inverse]


def noise_given(
    logits: Tensor, chosen: Tensor, seeds: Tensor, positions: Tensor, token_ids: Tensor
) -> Tensor:
    """Gumbel noise under which `chosen` wins: a draw from its distribution given that it did.

    The largest of logits + noise is a Gumbel draw about their log-sum, whichever token it is; the
    others are draws about their logits that stay below it (Maddison et al., arXiv 1411.0030).

    Args:
        logits: [P, V], temperature applied. chosen: int64 [P].
        seeds, positions: int64 [P], keys of the draws.
        token_ids: int64 [N], the tokens whose noise is wanted.

    Returns:
        [P, N].
    """
    keys = seeds[:, None], positions[:, None]
    top = logits.logsumexp(-1, keepdim=True) + gumbel(*keys, chosen[:, None], Stream.TARGET)
    own, free = logits[:, token_ids], gumbel(*keys, token_ids, Stream.TARGET)
    below = -torch.logaddexp(-top, -(own + free))
    wins = token_ids == chosen[:, None]
    # An impossible token's noise has no bearing on anything.
    return torch.where(own > -torch.inf, torch.where(wins, top, below) - own, free)


class RankingFit:
    """The temperature of each slot under which texts are most probable, as counts over texts."""

    def __init__(self, slots: int) -> None:
        self.losses = torch.zeros(slots, len(GRID), dtype=torch.float64)

    def add(self, head: PackedHead, part: ScoredPart) -> None:
        """Count the labels of some anchors, each slot biased by the text's own token before it."""
        places = head.to_indices(part.labels, IGNORED)
        before = torch.cat([part.bonus_tokens[..., None], part.labels[..., :-1].clamp(min=0)], -1)
        for slot in range(places.shape[2]):
            is_label = places[:, :, slot] != IGNORED
            scores, own = part.scores[:, :, slot][is_label], places[:, :, slot][is_label]
            if head.config.markov_rank:
                gate = part.gate(slot)
                gate = None if gate is None else gate[is_label]
                scores = scores + head.markov_logits(before[:, :, slot][is_label], gate).float()
            for index, tau in enumerate(GRID):
                scaled = scores / tau
                best = scaled.gather(1, own[:, None])[:, 0]
                self.losses[slot, index] += float((scaled.logsumexp(1) - best).double().sum())

    @property
    def ranking(self) -> tuple[float, ...]:
        """The best temperature of each slot; 1 for one that no label was seen of."""
        return tuple(GRID[int(losses.argmin())] if losses.any() else 1.0 for losses in self.losses)


def fit_ranking(
    head: PackedHead,
    target: HookedTarget,
    texts: Iterable[Texts],
    packed: bool,
    seed: int,
    memory: int = DEFAULT_MEMORY,
) -> Ranking:
    """The temperatures that suit greedy texts best, and those for sampled ones, label by label.

    Each of `texts` was written at one temperature. Without greedy texts, or without sampled ones,
    one fit stands for both.
    """
    slots = head.config.num_draft_slots
    fits = {False: RankingFit(slots), True: RankingFit(slots)}
    for each in texts:
        for batch in plan_all(each.lengths, Budget(BATCH_TOKENS, packed=packed)):
            rows = run_target(target, collate(each, batch, None, None), packed)
            temperature = float(each.temperatures[batch[0][0]])
            for part in scored_parts(head, target, rows, slots, temperature, seed, memory):
                fits[temperature > 0].add(head, part)
    known = {is_sampled: fit.ranking for is_sampled, fit in fits.items() if fit.losses.any()}
    some = next(iter(known.values()), (1.0,) * slots)
    return Ranking(known.get(False, some), known.get(True, some))


def share_error(tokens: Sequence[float], steps: Sequence[float]) -> float:
    """Standard error of sum(tokens) / sum(steps) over independent texts; 0 for a single one."""
    count, total = len(steps), sum(steps)
    if count < 2:
        return 0.0
    ratio = sum(tokens) / total
    squares = sum((t - ratio * s) ** 2 for t, s in zip(tokens, steps, strict=True))
    return float((squares * count / (count - 1)) ** 0.5 / total)
