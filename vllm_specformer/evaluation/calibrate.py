"""How probably drafts are accepted, observed on known texts, and the curve fitted to it.

Seen is what adaptive verification and thresholds ask for while serving: in every slot the head's
largest probability along its best tokens, at the request's temperature. A greedy draft is accepted
if the text goes on with it. A drawn one is accepted with the overlap of head and target, which is
known exactly. A slot counts as often as a step gets that far.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_specformer.calibration import Calibration, largest_log_odds
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.evaluation.trees import BATCH_TOKENS, ScoredPart, scored_parts
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import DEFAULT_MEMORY, PackedHead
from vllm_specformer.training.packing import Batch, Budget, collate, plan_all
from vllm_specformer.training.slot_loss import IGNORED
from vllm_specformer.training.texts import Texts

BINS = 10  # of the expected calibration error
LEAST_TEXTS = 8
# Of the fit: a pull towards the probability itself, as strong as so many drafts; the slope stays
# above a bound, as more confidence must not mean less.
_RIDGE, _LEAST_SLOPE, _ROUNDS = 1.0, 0.01, 50

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """N slots of drafts.

    Attributes:
        slot: number of the slot, from 0.
        log_odds: of the head's largest probability there.
        chance: how probably its draft is accepted once those before it are.
        weight: how probably those are; 0 where they are known to be refused.
        step: number of the anchor that was drafted at.
        text: id of the text.
    """

    slot: NDArray[np.int64]
    log_odds: Floats
    chance: Floats
    weight: Floats
    step: NDArray[np.int64]
    text: NDArray[np.int64]

    def at(self, where: NDArray[Any]) -> Observed:
        """Some of them, by index or mask."""
        return Observed(*(values[where] for values in vars(self).values()))

    def halves(self) -> tuple[Observed, Observed]:
        """Those of the first half of the texts by id, and those of the rest."""
        half = np.median(np.unique(self.text))
        return self.at(self.text <= half), self.at(self.text > half)

    @staticmethod
    def together(parts: Sequence[Observed]) -> Observed:
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Observed(*(np.concatenate(column) for column in columns))


@torch.no_grad()
def observe(
    head: PackedHead,
    target: HookedTarget,
    texts: Texts,
    packed: bool,
    slots: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Observed:
    """The drafts at all anchors of texts that were written at one temperature."""
    temperature = round(float(texts.temperatures[0]), 4)
    found, steps = [], 0
    for batch in plan_all(texts.lengths, Budget(BATCH_TOKENS, packed=packed)):
        rows = run_target(target, collate(texts, batch, None, None), packed)
        owners = _owners(rows, texts, batch)
        wanted = slots or head.config.num_draft_slots
        for part in scored_parts(head, target, rows, wanted, 0.0, 0, memory):
            columns = _of_part(head, target, rows, part, temperature)
            of_anchor = [owners[:, part.anchors], _numbered(owners[:, part.anchors], steps)]
            steps += of_anchor[0].numel()
            spread = [c[..., None].expand_as(columns[0]) for c in of_anchor]
            keep = part.labels != IGNORED
            slot = torch.arange(wanted, device=spread[0].device).expand_as(columns[0])
            text, step, place = (c[keep].cpu().numpy() for c in (*spread, slot))
            odds, chance, weight = (c[keep].double().cpu().numpy() for c in columns)
            found.append(Observed(place, odds, chance, weight, step, text))
    return Observed.together(found)


def _owners(rows: HookedRows, texts: Texts, batch: Batch) -> Tensor:
    """Id of the text that each anchor is in, int64 [rows, A]."""
    most = max(map(len, batch)) + 1  # the padding of a row is a segment, too
    table = torch.zeros(len(batch), most, dtype=torch.int64)
    for number, row in enumerate(batch):
        table[number, : len(row)] = torch.from_numpy(texts.ids[list(row)])
    segments = rows.at(rows.segments, rows.anchors)
    return table.to(segments.device).gather(1, segments)


def _numbered(like: Tensor, first: int) -> Tensor:
    return torch.arange(first, first + like.numel(), device=like.device).view_as(like)


def _of_part(
    head: PackedHead, target: HookedTarget, rows: HookedRows, part: ScoredPart, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds, chance and weight, each [rows, part, n]; weight 0 past an answer's end."""
    heat = temperature or 1.0
    markov = bool(head.config.markov_rank)
    best = previous = part.bonus_tokens
    weight = torch.ones(best.shape, device=best.device)
    columns: list[tuple[Tensor, ...]] = []
    for slot in range(part.labels.shape[2]):
        label, own, gate = part.labels[:, :, slot], part.scores[:, :, slot], part.gate(slot)
        is_known = label != IGNORED
        label = label.clamp(min=0)
        along = own + head.markov_logits(best, gate).float() if markov else own
        odds = largest_log_odds(along / heat)
        best = head.to_tokens(along.argmax(-1))
        if temperature:
            drawn = own + head.markov_logits(previous, gate).float() if markov else own
            seen = rows.after_anchors(1 + slot)[:, part.anchors]
            chance, ratio = _overlap(
                head, target, rows.at(rows.last_states, seen), drawn, label, heat
            )
        else:
            chance = ratio = (best == label).float()
        weight = weight * is_known
        columns.append((odds, chance, weight))
        weight, previous = weight * ratio, label
    odds, chance, weight = (torch.stack(c, dim=-1) for c in zip(*columns, strict=True))
    return odds, chance, weight


def _overlap(
    head: PackedHead,
    target: HookedTarget,
    states: Tensor,
    scores: Tensor,
    label: Tensor,
    heat: float,
) -> tuple[Tensor, Tensor]:
    """How probably a drawn draft is accepted, and how probably `label` came of an accepted one.

    sum(min(p, q)), and min(1, q / p) of the label, which is a target id [...].
    """
    p = (target.lm_head(states).float() / heat).softmax(-1)
    q = (scores / heat).softmax(-1)
    place = head.to_indices(label, IGNORED)
    own = q.gather(-1, place.clamp(min=0)[..., None])[..., 0] * (place != IGNORED)
    ratio = (own / p.gather(-1, label[..., None])[..., 0].clamp(min=1e-30)).clamp(max=1)
    if head.draft_token_ids is not None:
        p = p.index_select(-1, head.draft_token_ids)
    return torch.minimum(p, q).sum(-1), ratio


def fit(seen: Observed, slots: int) -> Calibration:
    """The likeliest curve: one slope, an intercept per slot, by Newton's method."""
    start = np.array([1.0, *[0.0] * slots])
    columns = np.zeros((len(seen.slot), slots + 1))
    columns[:, 0] = seen.log_odds
    columns[np.arange(len(seen.slot)), seen.slot + 1] = 1

    def loss(theta: Floats) -> float:
        odds = columns @ theta
        own = (np.logaddexp(0, odds) - seen.chance * odds) * seen.weight
        return float(own.sum() + _RIDGE * ((theta - start) ** 2).sum() / 2)

    theta = start.copy()
    for _ in range(_ROUNDS):
        chances = _sigmoid(columns @ theta)
        gradient = columns.T @ (seen.weight * (chances - seen.chance)) + _RIDGE * (theta - start)
        weight = seen.weight * chances * (1 - chances)
        hessian = (columns * weight[:, None]).T @ columns + _RIDGE * np.eye(slots + 1)
        step = np.linalg.solve(hessian, gradient)
        before, size = loss(theta), 1.0
        while size > 1e-4 and loss(theta - size * step) > before:
            size /= 2
        theta = theta - size * step
        theta[0] = max(theta[0], _LEAST_SLOPE)
        if np.abs(size * step).max() < 1e-6:
            break
    slope, *intercepts = (round(float(value), 4) for value in theta)
    return Calibration(slope, tuple(intercepts))


def chances_of(calibration: Calibration, seen: Observed) -> Floats:
    """What a calibration says of each slot."""
    intercepts = np.array(calibration.intercepts)[seen.slot]
    return _sigmoid(calibration.slope * seen.log_odds + intercepts)


def errors(found: Floats, seen: Observed) -> dict[str, float]:
    """Expected calibration error over equal bins, and log loss, by the slots' weights."""
    bins = np.minimum((found * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, seen.weight * (found - seen.chance), minlength=BINS)
    sure = found.clip(1e-9, 1 - 1e-9)
    losses = -(seen.chance * np.log(sure) + (1 - seen.chance) * np.log(1 - sure))
    total = seen.weight.sum()
    return {
        "ece": round(float(np.abs(gaps).sum() / total), 4),
        "log_loss": round(float((seen.weight * losses).sum() / total), 4),
    }


def calibrate(seen: Observed, slots: int) -> tuple[Calibration, dict[str, Any]]:
    """A fit to all texts, and how good such a fit is, tried on texts it has not seen.

    Raises:
        SpecFormerError: too few texts to tell.
    """
    count = len(np.unique(seen.text))
    if count < LEAST_TEXTS:
        raise SpecFormerError(
            f"--calibrate: {count} answers of a temperature are too few, at least {LEAST_TEXTS} "
            "are needed",
            "give more prompts, or raise --max-prompts",
        )
    known, unseen = seen.halves()
    found = fit(seen, slots)
    return found, {
        "texts": count,
        "calibration": list(found.field),
        "probability": errors(chances_of(Calibration.none(slots), unseen), unseen),
        "fitted_to_the_other_half": errors(chances_of(fit(known, slots), unseen), unseen),
    }


def calibrate_kinds(
    texts: Iterable[Texts], head: PackedHead, target: HookedTarget, packed: bool, memory: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Fields of the head's configuration, and the report, for the kinds of texts there are.

    Each of `texts` was written at one temperature; all above 0 are fitted together.
    """
    kinds: dict[str, list[Observed]] = {}
    for each in texts:
        kind = "sampled" if float(each.temperatures[0]) > 0 else "greedy"
        kinds.setdefault(kind, []).append(observe(head, target, each, packed, memory=memory))
    names = {"greedy": "acceptance_calibration", "sampled": "acceptance_calibration_sampled"}
    fields, report = {}, {}
    for kind, parts in kinds.items():
        found, report[kind] = calibrate(Observed.together(parts), head.config.num_draft_slots)
        fields[names[kind]] = list(found.field)
    return fields, report


def _sigmoid(odds: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-odds))
    return found
