"""Why a head drafts otherwise in the engine than offline: hypotheses, and what speaks for each.

A mistake in serving (or in the training that the replay repeats) leaves a signature: the engine's
steps are those of a head that is run in some wrong way. So the usual mistakes are made on purpose,
offline, and the one whose drafts explain the engine's steps best is named.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from vllm_specformer.evaluation.agreement import Agreement, Step, engine_steps
from vllm_specformer.evaluation.replay import Alter, draft_texts
from vllm_specformer.evaluation.served import Served
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import PackedHead
from vllm_specformer.training.texts import Texts

# A hypothesis is named if it explains this share of the engine's steps, and so much of what the
# head as configured leaves unexplained.
_EXPLAINS = 0.9
_OF_THE_REST = 0.5
# Below this share of its own most probable words the engine's greedy text is another model's.
_SAME_TARGET = 0.98


@dataclass(frozen=True)
class Hypothesis:
    """A way of running the head wrongly, and the share of the engine's steps it explains."""

    name: str
    explained: float


@dataclass(frozen=True)
class _Mistake:
    """A wrong way to run a head: on which hooks and rows, with which fields of its config."""

    name: str
    target: HookedTarget
    alter: Alter | None = None
    config: dict[str, Any] = field(default_factory=dict)


def hypotheses(
    head: PackedHead, target: HookedTarget, texts: Texts, served: Served, packed: bool
) -> list[Hypothesis]:
    """Every hypothesis tried on the engine's answers, the best first."""
    found = []
    for mistake in _mistakes(head, target):
        with _configured(head, mistake.config):
            made = draft_texts(
                head, mistake.target, texts, [served.num_tokens], packed, alter=mistake.alter
            )
            steps = list(engine_steps(served, {text.id: text for text in made}))
        same = sum(step.accepted == step.expected for step in steps)
        found.append(Hypothesis(mistake.name, same / max(1, len(steps))))
    return sorted(found, key=lambda item: -item.explained)


def _mistakes(head: PackedHead, target: HookedTarget) -> Iterator[_Mistake]:
    config, ids, layers = head.config, target.hook_ids, len(target.layers)
    if ids[-1] == layers:
        yield _Mistake("the last hook is taken behind the final norm", target, _normed)
    for name, shift in (("earlier", -1), ("later", 1)):
        moved = tuple(min(max(i + shift, 0), layers) for i in ids)
        unique = HookedTarget(target.target, sorted(set(moved)))
        chosen = [unique.hook_ids.index(i) for i in moved]
        yield _Mistake(
            f"the hooks are taken one layer {name}", unique, partial(_spread, chosen=chosen)
        )
    yield _Mistake("the context's K/V cache is lost", target, _without_context)
    if config.use_bonus_embedding:
        blind = copy.copy(target)
        blind.embed = lambda tokens: torch.zeros_like(  # type: ignore[method-assign]
            target.embed(tokens)
        )
        yield _Mistake("the bonus token does not reach the head", blind)
    other = "too many" if config.nested_slots else "too few"
    yield _Mistake(
        f"{other} slots are computed", target, config={"nested_slots": not config.nested_slots}
    )
    if config.markov_rank:
        yield _Mistake("the Markov term is left out", target, config={"markov_rank": 0})
    if config.markov_gate:
        yield _Mistake(
            "the Markov term's gates are left out", target, config={"markov_gate": False}
        )


def _normed(rows: HookedRows) -> HookedRows:
    return replace(rows, hooked_states=[*rows.hooked_states[:-1], rows.last_states])


def _spread(rows: HookedRows, chosen: list[int]) -> HookedRows:
    """As many states as the head wants, where shifted hooks coincide."""
    return replace(rows, hooked_states=[rows.hooked_states[i] for i in chosen])


def _without_context(rows: HookedRows) -> HookedRows:
    """Every token a text of its own, so that an anchor sees itself only."""
    tokens = torch.arange(rows.segments.shape[1], device=rows.segments.device)
    return replace(rows, segments=tokens.expand_as(rows.segments))


@contextmanager
def _configured(head: PackedHead, fields: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(head.config, name) for name in fields}
    for name, value in fields.items():
        setattr(head.config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(head.config, name, value)


def explain(agreement: Agreement, served: Served, tried: list[Hypothesis], dtype: str) -> list[str]:
    """What the evidence says about a disagreement, line by line, the strongest first."""
    lines = []
    plain = agreement.same_steps
    best = tried[0]
    if best.explained >= _EXPLAINS and 1 - best.explained <= _OF_THE_REST * (1 - plain):
        lines.append(
            f"most likely: {best.name}. The engine's steps are those of a head run this way in "
            f"{best.explained:.1%} of the cases, against {plain:.1%} as configured. The head's "
            "config.json (hooks, nested_slots) must be that of its training, and training and "
            "serving the same release of vllm-specformer"
        )
    own = agreement.own_words
    if own is not None and own < _SAME_TARGET:
        lines.append(
            f"another target: only {own:.1%} of the engine's greedy tokens are the most probable "
            "ones of the target that was loaded offline. Other weights or revision, quantisation "
            f"or another dtype than {dtype}: compare --engine-args with the target's files"
        )
    elif own is not None:
        lines.append(
            f"not another target: {own:.1%} of the engine's greedy tokens are the offline target's "
            "own; and not the chat template: both sides were given the same token ids"
        )
    preempted = served.counters.get("num_preemptions", 0)
    if preempted:
        lines.append(
            f"{preempted} preemptions: the K/V cache is too small for the load, and a request that "
            "starts again has a step without drafts; give more with --engine-args"
        )
    hits = served.counters.get("prefix_cache_hits", 0)
    if hits:
        lines.append(
            f"{hits} tokens came from the prefix cache; if it agrees with --engine-args "
            "'{\"enable_prefix_caching\": false}', the cached K/V of the head are wrong"
        )
    if not lines or not lines[0].startswith("most likely"):
        tried_names = "; ".join(f"{item.name} {item.explained:.1%}" for item in tried)
        lines.append(
            f"unexplained: as configured {plain:.1%} of the steps are the engine's. Tried offline: "
            f"{tried_names}"
        )
    if dtype != "float32":
        lines.append(f"{dtype} rounds differently on both sides; --dtype float32 rules that out")
    if agreement.first is not None:
        lines.append(first_difference(agreement.first, agreement.num_tokens))
    return lines


def first_difference(step: Step, num_tokens: int) -> str:
    """The first step that differs, in token ids."""
    text, at = step.text, step.position
    return (
        f"first difference: prompt {text.id}, behind token {at + 1}. The text goes on "
        f"{text.tokens[at + 2 : at + 3 + num_tokens]}, the head drafts offline "
        f"{text.drafts[num_tokens][at]}, of which {step.expected} would be accepted; the engine "
        f"accepted {step.accepted} of its own"
    )
