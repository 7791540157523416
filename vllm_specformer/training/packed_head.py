"""The head as it is trained: packed rows in, one loss out, in memory that does not grow with K.

Source: Shi et al. (arXiv 2511.20340), "Implementation Improvements": each slot goes through the
frozen norm and lm_head by itself, and its loss is propagated into the detached slot states. Here
the anchors are taken in parts as well, sized so that slot states, attention scores and one slot's
logits together stay within a fixed amount of memory. All of it happens inside one autograd
function, so that a training loop (and data parallelism) sees one loss and one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.ends import TargetEnds
from vllm_specformer.training.accumulated import Accumulated, Gradients
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.slot_loss import IGNORED, Mix, TargetProbs, slot_loss
from vllm_specformer.training.vocabulary_sample import VocabularySample, draw_sample

DEFAULT_MEMORY = 256 << 20


# With `by_reach` no slot's weight falls below half of that of the one before it.
_SURE = 0.5


@dataclass(frozen=True)
class Objective:
    """What the head is trained for.

    `slot_weights`: one weight per slot; in a step they are normalised over the slots that have
    labels. `mix`: the losses of a slot; the target's distribution is the one over the draft
    vocabulary, renormalised. `memory`: bytes that logits and slot activations may take, about.
    `sample`: tokens that a step scores, about (see `vocabulary_sample`); 0: all. `by_reach`: a
    slot's weight is multiplied, anchor by anchor, by how sure the head is of the tokens before it,
    since what stands behind a wrong draft is thrown away (after D-PACE, arXiv 2605.18810, whose
    weight looks at later slots, too).
    """

    slot_weights: tuple[float, ...]
    mix: Mix = field(default_factory=Mix)
    memory: int = DEFAULT_MEMORY
    sample: int = 0
    by_reach: bool = False


@dataclass(frozen=True)
class _Context:
    """The context layer's states at the anchors, and its keys and values everywhere."""

    anchor: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class _Labels:
    """What the slots are to say, int64 [rows, A, K].

    `indices` are places in the head's logits, or `IGNORED`: past the answer's end, or outside the
    draft vocabulary. `previous` is the token one slot earlier, a target id whether it is scored or
    not.
    """

    indices: Tensor
    previous: Tensor

    @property
    def counts(self) -> Tensor:
        """Labels of each slot, int64 [K]."""
        return (self.indices != IGNORED).sum((0, 1))

    def exist(self, part: slice, slot: int) -> Tensor:
        """Whether there are labels in a slot of some anchors, bool [rows * part]."""
        return (self.indices[:, part, slot] != IGNORED).flatten()


class PackedHead(SpecFormerHead):
    """A `SpecFormerHead`, weight for weight, whose forward pass takes packed rows.

    It is saved and loaded as its base class is.
    """

    # The Trainer divides by the number of accumulated batches, as the loss is a mean.
    accepts_loss_kwargs = False

    def forward(  # type: ignore[override]
        self,
        rows: HookedRows,
        target: TargetEnds,
        num_slots: int,
        objective: Objective,
    ) -> tuple[Tensor, Tensor]:
        """The objective's loss, and the cross entropy of each slot, float32 [num_slots].

        A slot without labels has the cross entropy NaN. Unlike other losses this one can pass its
        gradient back once only.
        """
        labels = self._labels(rows, num_slots)
        context = self._context(rows)

        def run(leaves: list[Tensor], gradients: Gradients) -> tuple[Tensor, Tensor]:
            return self._accumulate(_Context(*leaves), gradients, rows, target, labels, objective)

        leaves = [context.anchor, context.query, context.key, context.value]
        parameters = [p for p in self.parameters() if p.requires_grad]
        return cast(tuple[Tensor, Tensor], Accumulated.apply(run, 4, *leaves, *parameters))

    def _labels(self, rows: HookedRows, num_slots: int) -> _Labels:
        tokens = rows.labels(num_slots)
        before = [rows.bonus_tokens.unsqueeze(-1), tokens[..., :-1].clamp(min=0)]
        return _Labels(self.to_indices(tokens, IGNORED), torch.cat(before, dim=-1))

    def _context(self, rows: HookedRows) -> _Context:
        context = self.combine(rows.hooked_states)
        query, key, value = self.context_qkv(context, rows.position_ids)
        return _Context(rows.at(context, rows.anchors), rows.at(query, rows.anchors), key, value)

    def slot_states(
        self, context: _Context, rows: HookedRows, target: TargetEnds, part: slice, num_slots: int
    ) -> Tensor:
        """What `SpecFormerHead.forward` gives for some of the anchors: [rows, part, K, H].

        The context of an anchor are the tokens up to it in its own text.
        """
        anchors = rows.anchors[:, part]
        own = rows.at(rows.segments, anchors).unsqueeze(-1) == rows.segments.unsqueeze(1)
        visible = own & self.seen(rows.position_ids, rows.at(rows.position_ids, anchors))
        query = context.query[:, part].unsqueeze(2)
        attended = self._attend(query, context.key, context.value, visible)
        bonus = None
        if self.config.use_bonus_embedding:
            bonus = target.embed(rows.bonus_tokens[:, part])
        slots = self.expand(context.anchor[:, part], attended.squeeze(2), bonus, num_slots)
        attend = self._attend_slots(context.key, context.value, visible)
        return self.run_slots(slots, rows.at(rows.position_ids, anchors), attend)

    def _parts(self, rows: HookedRows, num_slots: int, logits: int, memory: int) -> Iterator[slice]:
        """Split the anchors so that each part's activations take `memory` bytes, about.

        Args:
            logits: numbers of 4 bytes over the vocabulary that are held at once per anchor.
        """
        config = self.config
        length = rows.segments.shape[1]
        scores = 3 * config.num_attention_heads * length  # scores, weights, one gradient
        widths = 16 * config.hidden_size + 6 * config.intermediate_size
        activations = num_slots * config.num_slot_layers * (scores + widths)
        per_anchor = 4 * (logits + activations)
        total = rows.anchors.shape[1]
        size = max(1, memory // (per_anchor * len(rows.anchors)))
        # Of equal size, as a small rest would cost a whole pass over the weights.
        size = math.ceil(total / math.ceil(total / size))
        for first in range(0, total, size):
            yield slice(first, min(first + size, total))

    def _accumulate(
        self,
        context: _Context,
        gradients: Gradients,
        rows: HookedRows,
        target: TargetEnds,
        labels: _Labels,
        objective: Objective,
    ) -> tuple[Tensor, Tensor]:
        """Loss and loss per slot; adds to `gradients`, part by part and slot by slot."""
        counts = labels.counts
        num_slots, device = len(counts), counts.device
        weights = torch.tensor(objective.slot_weights[:num_slots], device=device)
        weights = weights * (counts > 0)
        total = weights.sum()  # 0 if the batch has no token of the draft vocabulary
        scales = weights / (torch.where(total > 0, total, 1) * counts.clamp(min=1))
        losses = torch.zeros(2, num_slots, device=device)
        markov = self.markov_parameters()
        sample = self._sample(rows, target, labels, objective)
        logits = 4 + 3 * objective.mix.needs_target
        if objective.mix.needs_target:
            logits += 2 * math.ceil(_positions_per_anchor(rows, num_slots))
        logits *= self.config.num_scored_tokens if sample is None else len(sample.indices)
        for part in self._parts(rows, num_slots, logits, objective.memory):
            slots = self.slot_states(context, rows, target, part, num_slots)
            probs, places = self._target_probs(rows, target, part, num_slots, objective.mix, sample)
            slot_gradients = []
            reach: Tensor | None = None
            for slot, scale in enumerate(scales):
                states = slots[:, :, slot].detach().requires_grad_()
                mixed, cross_entropy = self._slot_loss(
                    states, slot, target, labels, part, objective.mix, probs, places, sample, reach
                )
                losses[:, slot] += torch.stack([mixed, cross_entropy.sum()]).detach()
                if objective.by_reach:
                    sure = torch.exp(-cross_entropy) * labels.exist(part, slot)
                    sure = _SURE + (1 - _SURE) * sure
                    reach = sure if reach is None else reach * sure
                # The first slot may have no Markov term.
                gradient, *rest = torch.autograd.grad(
                    mixed * scale, [states, *markov], allow_unused=True
                )
                slot_gradients.append(gradient)
                gradients.add(markov, rest)
            gradients.backward(slots, torch.stack(slot_gradients, dim=2))
        gradients.complete(markov)
        return losses[0] @ scales, losses[1] / counts

    def markov_parameters(self) -> list[Tensor]:
        """What the logits depend on beside the slot states."""
        if not self.config.markov_rank:
            return []
        gate = [self.markov_gate.weight] if self.config.markov_gate else []
        return [self.markov_embed.weight, self.markov_lm_head.weight, *gate]

    @torch.no_grad()
    def _target_probs(
        self,
        rows: HookedRows,
        target: TargetEnds,
        part: slice,
        num_slots: int,
        mix: Mix,
        sample: VocabularySample | None,
    ) -> tuple[TargetProbs | None, Tensor | None]:
        """The target's distributions at what the slots of some anchors predict.

        Slots of neighbouring anchors look at the same positions, so each is computed once.

        Returns:
            The distributions, and where each slot finds its own, int64 [rows, part, K].
        """
        if not mix.needs_target:
            return None, None
        # The state that has seen the text up to the label decides the label's distribution.
        found, places = _predicted(rows, part, num_slots).unique(return_inverse=True)
        seen = rows.last_states.flatten(0, 1)[found]
        if sample is None:
            return TargetProbs.of(self.scored(target.lm_head(seen))), places
        return TargetProbs.of(sample.lm_head(seen) + sample.offsets), places

    def _sample(
        self, rows: HookedRows, target: TargetEnds, labels: _Labels, objective: Objective
    ) -> VocabularySample | None:
        """The tokens that this step scores; None: all."""
        total = self.config.num_scored_tokens
        if not 0 < objective.sample < total:
            return None
        found = _predicted(rows, slice(None), labels.indices.shape[-1]).unique()
        states = rows.last_states.flatten(0, 1)[found]
        size, memory = objective.sample, objective.memory
        return draw_sample(target, total, states, labels.indices, size, memory)

    def _slot_loss(
        self,
        states: Tensor,
        slot: int,
        target: TargetEnds,
        labels: _Labels,
        part: slice,
        mix: Mix,
        probs: TargetProbs | None = None,
        places: Tensor | None = None,
        sample: VocabularySample | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of one slot of some anchors: the sum of what is trained, and their cross entropies.

        The latter float32 [rows * part], of which `weights` are the weights in the former.
        """
        own = labels.indices[:, part, slot].flatten()
        if sample is not None:
            own = sample.places(own)
        logits = self._logits(states, target, labels.previous[:, part, slot], slot, sample)
        at = None if places is None else places[:, :, slot].flatten()
        return slot_loss(logits.flatten(0, 1), own, mix, probs, at, weights)

    def _logits(
        self,
        states: Tensor,
        target: TargetEnds,
        previous: Tensor,
        slot: int,
        sample: VocabularySample | None = None,
    ) -> Tensor:
        """Of states [..., H] of one slot behind tokens [...]: [..., N], or [..., S] of a sample."""
        normed = target.norm(states)
        config = self.config
        if not config.markov_rank or (config.markov_gate and slot == 0):
            return self._own_logits(normed, target, sample)
        earlier = self.earlier(previous, target)
        if config.markov_gate:
            earlier = earlier * self.gate(normed)
        own = self._own_logits(self.moved(normed, earlier), target, sample)
        return own + self.markov_scores(earlier, None if sample is None else sample.indices)

    def _own_logits(
        self, normed: Tensor, target: TargetEnds, sample: VocabularySample | None
    ) -> Tensor:
        """What states behind the final norm say by themselves."""
        if sample is None:
            return self.scored(target.lm_head(normed))
        return sample.lm_head(normed) + sample.offsets

    def earlier(self, tokens: Tensor, target: TargetEnds) -> Tensor:
        """Rows of the Markov term's first table, int64 [...] -> [..., rank]."""
        return self.markov_embed(tokens)

    def moved(self, normed: Tensor, earlier: Tensor) -> Tensor:
        """States behind the final norm [..., H], moved by what came before them [..., rank]."""
        return normed

    def merged(self, target: TargetEnds) -> PackedHead:
        """The head as it is measured and saved; see `leaning_head`."""
        return self

    @torch.no_grad()
    def drafts(
        self, rows: HookedRows, target: TargetEnds, wanted: int, memory: int = DEFAULT_MEMORY
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy drafts as the engine makes them when asked for `wanted` tokens.

        Returns:
            int64 [rows, A, wanted]; the sum of each slot's cross entropies, float32 [wanted]; the
            number of labels of each slot, int64 [wanted].
        """
        labels = self._labels(rows, wanted)
        context = self._context(rows)
        running = self.slots_to_run(wanted)
        found = []
        losses = torch.zeros(wanted, device=rows.anchors.device)
        for part in self._parts(rows, running, 3 * wanted * self.config.num_scored_tokens, memory):
            slots = self.slot_states(context, rows, target, part, running)[:, :, :wanted]
            for slot in range(wanted):
                each = self._slot_loss(slots[:, :, slot], slot, target, labels, part, Mix())[1]
                losses[slot] += each.sum()
            normed = target.norm(slots)
            bonus, gates = rows.bonus_tokens[:, part], self.markov_gates(normed)
            found.append(self.draft(target.lm_head(normed), bonus, gates))
        return torch.cat(found, dim=1), losses, labels.counts

    @torch.no_grad()
    def chances(
        self,
        rows: HookedRows,
        target: TargetEnds,
        wanted: int,
        temperature: float,
        memory: int = DEFAULT_MEMORY,
        keep: Callable[[Tensor], Tensor] = lambda scores: scores,
    ) -> Tensor:
        """How probably the text's next tokens came of drafts drawn from the head.

        A step that drafts `x` from q accepts it with probability min(1, p(x) / q(x)). So of the
        times it emits `y`, which are p(y), it was the draft in min(p(y), q(y)).

        Args:
            temperature: at which text and drafts were drawn, above 0.
            keep: what filtered the target's logits [..., V] after the temperature (top-p, top-k).

        Returns:
            float32 [rows, A, wanted]: min(1, q / p) of the token in each slot, given that all
            before it were accepted; 0 past an answer's end.
        """
        labels = self._labels(rows, wanted)
        context = self._context(rows)
        running = self.slots_to_run(wanted)
        found = []
        for part in self._parts(rows, running, 5 * self.config.num_scored_tokens, memory):
            slots = self.slot_states(context, rows, target, part, running)
            chances = [
                self._chance(slots[:, :, slot], slot, rows, target, labels, part, temperature, keep)
                for slot in range(wanted)
            ]
            found.append(torch.stack(chances, dim=-1))
        return torch.cat(found, dim=1)

    def _chance(
        self,
        states: Tensor,
        slot: int,
        rows: HookedRows,
        target: TargetEnds,
        labels: _Labels,
        part: slice,
        temperature: float,
        keep: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """`chances` of one slot at some anchors, [rows, anchors of the part]."""
        own = labels.indices[:, part, slot]
        logits = self._logits(states, target, labels.previous[:, part, slot], slot)
        seen = rows.at(rows.last_states, rows.after_anchors(1 + slot)[:, part])
        tokens = rows.at(rows.input_ids, rows.after_anchors(2 + slot)[:, part])
        q = _log_prob(logits.float() / temperature, own.clamp(min=0))
        p = _log_prob(keep(target.lm_head(seen).float() / temperature), tokens)
        return (q - p).exp().clamp(max=1).masked_fill(own == IGNORED, 0)


def _predicted(rows: HookedRows, part: slice, num_slots: int) -> Tensor:
    """Where the target predicts what the slots of some anchors do, int64 [rows, part, K].

    Numbered through all rows.
    """
    length = rows.input_ids.shape[1]
    slots = torch.arange(num_slots, device=rows.anchors.device)
    positions = (rows.anchors[:, part].unsqueeze(-1) + 1 + slots).clamp(max=length - 1)
    starts = length * torch.arange(len(positions), device=slots.device)
    return positions + starts[:, None, None]


def _positions_per_anchor(rows: HookedRows, num_slots: int) -> float:
    """Different positions that the slots predict: 1 if anchors lie close, at most one per slot."""
    positions = _predicted(rows, slice(None), num_slots)
    return positions.unique().numel() / rows.anchors.numel()


def _log_prob(scores: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of one token per row: [..., V] and [...] -> [...]."""
    return scores.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
