"""The metrics of an evaluation as plain data, the way `--json` writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vllm_specformer.evaluation.agreement import Agreement
from vllm_specformer.evaluation.replay import (
    BOUND,
    DRAWN,
    HEAD,
    LOOKUPS,
    DraftedText,
    less_repetitive_half,
    replay,
    replay_tree,
)
from vllm_specformer.evaluation.served import Served
from vllm_specformer.evaluation.trees import share_error
from vllm_specformer.training.acceptance import Acceptance

Metrics = dict[str, Any]
ALL, HALF = "all", "less_repetitive_half"
CHAIN, NODES = "chain K=", "n="


def group_name(temperature: float) -> str:
    """ "greedy", or "temperature_0.7"."""
    return f"temperature_{temperature:g}" if temperature else "greedy"


def of_texts(
    texts: Sequence[DraftedText], budgets: Sequence[int], end_ids: frozenset[int], slots: int
) -> Metrics:
    """Acceptance on the texts of one temperature by method and number of drafted tokens.

    `slots` are the head's, which trees are drafted from.

    Beside the head: prompt lookups on the same texts, the same for the less repetitive half of
    them. Of sampled texts the head's best drafts, its drawn ones, which are what is served, and the
    bound that no deterministic draft can beat: the target's own most probable token everywhere.
    """
    is_sampled = bool(texts[0].temperature)
    methods = [HEAD, *LOOKUPS, BOUND, DRAWN] if is_sampled else [HEAD, *LOOKUPS]
    answers = [text.tokens[start:end] for text in texts for start, end in text.answers]
    metrics: Metrics = {
        "temperature": round(texts[0].temperature, 4),  # which is kept in 32 bits
        "texts": len(texts),
        "mean_answer_tokens": round(sum(map(len, answers)) / len(answers), 1),
        "finished_share": round(sum(a[-1] in end_ids for a in answers) / len(answers), 3),
        "repeated_4grams": round(sum(text.repeated for text in texts) / len(texts), 4),
    }
    for name, chosen in ((ALL, texts), (HALF, less_repetitive_half(texts))):
        metrics[name] = {
            method: {f"K={k}": _summary(replay(chosen, method, k)) for k in budgets}
            for method in methods
        }
    whole = metrics[ALL]
    metrics["over_lookup"] = _ratios(whole, served_method(whole), LOOKUPS)
    if BOUND in whole:
        metrics["share_of_bound"] = _ratios(whole, HEAD, (BOUND,))
    if texts[0].accepted:
        metrics["trees"] = of_trees(texts, max(budgets), slots)
    return metrics


def of_kinds(
    texts: Sequence[DraftedText],
    kinds: Mapping[int, str],
    budgets: Sequence[int],
    end_ids: frozenset[int],
    slots: int,
) -> Metrics:
    """The same for each kind of prompt, as `by_kind`, where there are several.

    With the mean over the kinds of the head's tokens per step, by the drafts that are served, in
    which each kind weighs as much as another, and of those of the better lookup in each.
    """
    groups: dict[str, list[DraftedText]] = {}
    for text in texts:
        groups.setdefault(kinds.get(text.id, "other"), []).append(text)
    if len(groups) < 2:
        return {}
    found = {kind: of_texts(groups[kind], budgets, end_ids, slots) for kind in sorted(groups)}
    mean = {}
    for k in (f"K={count}" for count in budgets):
        parts = [group[ALL] for group in found.values()]
        heads = [part[served_method(part)][k]["tokens_per_step"] for part in parts]
        lookups = [better_lookup(part, k) for part in parts]
        mean[k] = {
            "head": round(sum(heads) / len(heads), 3),
            "better_lookup": round(sum(lookups) / len(lookups), 3),
        }
    return {"by_kind": found, "mean_over_kinds": mean}


def better_lookup(metrics: Metrics, k: str) -> float:
    """Tokens per step of the better of the prompt lookups."""
    return max(metrics[method][k]["tokens_per_step"] for method in LOOKUPS)


def of_trees(texts: Sequence[DraftedText], chain: int, slots: int) -> Metrics:
    """Trees of each number of nodes, and beside them the chain of so many tokens."""
    rows = {f"{CHAIN}{chain}": [replay([text], HEAD, chain) for text in texts]}
    for nodes in texts[0].accepted:
        rows[f"{NODES}{nodes}"] = [replay_tree(text, nodes, slots) for text in texts]
    return {name: _summary_with_error(found) for name, found in rows.items()}


def _summary_with_error(found: Sequence[Acceptance]) -> Metrics:
    """Of the texts together; the standard error is over texts."""
    whole = Acceptance(found[0].num_slots)
    for one in found:
        whole.steps, whole.tokens = whole.steps + one.steps, whole.tokens + one.tokens
        for mine, others in ((whole.accepted, one.accepted), (whole.offered, one.offered)):
            mine[:] = [a + b for a, b in zip(mine, others, strict=True)]
    error = share_error([one.tokens for one in found], [one.steps for one in found])
    return _summary(whole) | {"stderr": round(error, 4), "steps": whole.steps}


def _summary(acceptance: Acceptance) -> Metrics:
    return {
        "tokens_per_step": round(acceptance.tokens_per_step, 3),
        "acceptance_per_position": [round(share, 3) for share in acceptance.per_position],
    }


def served_method(methods: Collection[str]) -> str:
    """Which of the methods of a temperature is what requests get unless others are asked for."""
    return DRAWN if DRAWN in methods else HEAD


def _ratios(metrics: Metrics, method: str, others: Iterable[str]) -> dict[str, float]:
    """A method's tokens per step over those of the best of the others, by K."""
    ratios = {}
    for k, mine in metrics[method].items():
        best = max(metrics[other][k]["tokens_per_step"] for other in others)
        ratios[k] = round(mine["tokens_per_step"] / best, 3)
    return ratios


def of_agreement(agreement: Agreement, served: Served, causes: Sequence[str]) -> Metrics:
    """One comparison with the engine."""
    return {
        "temperature": agreement.temperature,
        "num_speculative_tokens": agreement.num_tokens,
        "answers": agreement.answers,
        "offline": _counted(agreement.offline),
        "engine": _counted(agreement.engine),
        "difference": round(agreement.difference, 5),
        "agrees": agreement.agrees,
        "same_steps": round(agreement.same_steps, 5),
        "greedy_tokens_of_the_offline_target": agreement.own_words,
        "causes": list(causes),
        "vllm": served.vllm,
        "runner": served.runner,
        "counters": served.counters,
    }


def _counted(acceptance: Acceptance) -> Metrics:
    return {"steps": acceptance.steps, "tokens": acceptance.tokens, **_summary(acceptance)}
