"""The metrics of an evaluation as plain data, the way `--json` writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm_specformer.evaluation.agreement import Agreement
from vllm_specformer.evaluation.replay import (
    BOUND,
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
    them, and for sampled texts the bound that no deterministic draft can beat, which is to draft
    the target's own most probable token everywhere.
    """
    methods = [HEAD, *LOOKUPS, *([BOUND] if texts[0].temperature else [])]
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
    metrics["over_lookup"] = _ratios(whole, LOOKUPS)
    if BOUND in whole:
        metrics["share_of_bound"] = _ratios(whole, (BOUND,))
    if texts[0].accepted:
        metrics["trees"] = of_trees(texts, max(budgets), slots)
    return metrics


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


def _ratios(metrics: Metrics, others: Iterable[str]) -> dict[str, float]:
    """The head's tokens per step over those of the best of the others, by K."""
    ratios = {}
    for k, mine in metrics[HEAD].items():
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
