"""Offline figures of the pair on held-out prompts: the target's text and the head's acceptance.

Exact, without serving: under lossless verification the text does not depend on the drafts (see
vllm_specformer/training/acceptance.py). Beside the head stand a prompt lookup on the same texts,
the less repetitive half of the texts, and, at temperature 1, the bound no deterministic draft can
beat: drafting the target's own most probable token at every position of the sampled text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distill import complete, encode_prompts
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_specformer.head import SpecFormerHead
from vllm_specformer.training.acceptance import (
    Acceptance,
    Drafter,
    head_drafts,
    lookup_drafts,
    repeated_fraction,
)
from vllm_specformer.training.hidden_states import HookedTarget

MAX_NEW = 128
BUDGETS = (1, 2, 4, 8)


def generate(
    model: PreTrainedModel, prompts: list[list[int]], temperature: float, seed: int
) -> list[tuple[list[int], int]]:
    """(prompt + continuation, prompt length) of each prompt."""
    torch.manual_seed(seed)
    texts = []
    ordered = sorted(prompts, key=len)
    for first in tqdm(range(0, len(ordered), 64), desc=f"generating at T={temperature}"):
        batch = ordered[first : first + 64]
        answers = complete(model, batch, temperature, MAX_NEW)
        texts += [(p + a, len(p)) for p, a in zip(batch, answers, strict=True)]
    return texts


def target_choices(target: HookedTarget, text: Tensor) -> Tensor:
    """The target's most probable token after every position: int64 [T] -> int64 [T]."""
    _, last = target(text[None])
    return target.target.get_output_embeddings()(last)[0].argmax(-1)


def replay(
    texts: list[tuple[list[int], int]], make: Callable[[list[int], int], Drafter]
) -> dict[int, Acceptance]:
    """Acceptance of one drafting method over all texts, per number of drafted tokens."""
    results = {k: Acceptance(k) for k in BUDGETS}
    for text, start in texts:
        for k, acceptance in results.items():
            acceptance.walk(text, start, make(text, k))
    return results


def drafters(head: SpecFormerHead, target: HookedTarget) -> dict[str, Any]:
    """Name -> function that makes a drafter for a text."""

    def from_head(text: list[int], count: int) -> Drafter:
        drafts = head_drafts(head, target, torch.tensor(text), count).tolist()
        return lambda position: drafts[position]

    def bound(text: list[int], count: int) -> Drafter:
        best = target_choices(target, torch.tensor(text)).tolist()
        return lambda position: best[position + 1 : position + 1 + count]

    def lookup(shortest: int) -> Callable[[list[int], int], Drafter]:
        return lambda text, count: (
            lambda position: lookup_drafts(text, position + 2, 3, shortest, count)
        )

    return {"head": from_head, "bound": bound, "lookup_3": lookup(3), "lookup_2_3": lookup(2)}


def summary(results: dict[int, Acceptance]) -> dict[str, Any]:
    return {
        f"K={k}": {
            "tokens_per_step": round(a.tokens_per_step, 3),
            "acceptance_per_position": [round(x, 3) for x in a.per_position],
        }
        for k, a in results.items()
    }


def less_repetitive_half(texts: list[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
    ranked = sorted(texts, key=lambda item: repeated_fraction(item[0][item[1] :]))
    return ranked[: len(ranked) // 2]


def evaluate(
    target_path: Path, head_path: Path, corpus: Path, prompts: int, seed: int
) -> dict[str, Any]:
    """All figures as one JSON-able dictionary."""
    model = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.float32)
    head = SpecFormerHead.from_pretrained(head_path, dtype=torch.float32).eval()
    chosen = encode_prompts(corpus, "held_out", prompts)
    greedy = generate(model, chosen, 0.0, seed)
    sampled = generate(model, chosen, 1.0, seed)
    target = HookedTarget(model, head.config.aux_hidden_state_layer_ids)
    make = drafters(head, target)
    half = less_repetitive_half(greedy)
    answers = [text[start:] for text, start in greedy]
    report: dict[str, Any] = {
        "prompts": len(chosen),
        "max_new_tokens": MAX_NEW,
        "mean_answer_tokens": round(sum(map(len, answers)) / len(answers), 1),
        "finished_share": round(
            sum(a[-1] == model.config.eos_token_id for a in answers) / len(answers), 3
        ),
        "repeated_4grams": round(sum(map(repeated_fraction, answers)) / len(answers), 4),
    }
    for name, texts in (("greedy", greedy), ("greedy_less_repetitive_half", half)):
        report[name] = {
            method: summary(replay(texts, make[method]))
            for method in ("head", "lookup_3", "lookup_2_3")
        }
    report["temperature_1"] = {method: summary(replay(sampled, make[method])) for method in make}
    best = report["temperature_1"]["bound"]["K=4"]["tokens_per_step"]
    mine = report["temperature_1"]["head"]["K=4"]["tokens_per_step"]
    report["temperature_1_share_of_bound"] = round(mine / best, 3)
    lookup = max(report["greedy"][m]["K=4"]["tokens_per_step"] for m in ("lookup_3", "lookup_2_3"))
    report["greedy_over_lookup"] = round(
        report["greedy"]["head"]["K=4"]["tokens_per_step"] / lookup, 3
    )
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    report = evaluate(args.target, args.head, args.corpus, args.prompts, args.seed)
    text = json.dumps(report, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
