"""How well a slot's largest probability tells whether its draft is accepted.

    python benchmarks/slot_chances.py            # benchmarks/results/slot-chances.json; 2 minutes

Compared are the probability itself, vLLM's estimator of adaptive verification after so many of its
refits, the calibration in the head's config.json, which was fitted on other prompts, and vLLM's
estimator that begins with it. All but the first are chance = sigmoid(slope * log-odds + intercept
of the slot). The estimator learns from one half of the texts, errors are those of the other half.
Once it serves requests of one temperature alone, once all of them side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_specformer.calibration import Calibration, Calibrations
from vllm_specformer.distill.dialogue import Request
from vllm_specformer.evaluation.answers import answer
from vllm_specformer.evaluation.calibrate import (
    Floats,
    Observed,
    chances_of,
    errors,
    fit,
    observe,
)
from vllm_specformer.target.files import end_token_ids
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.packed_head import PackedHead
from vllm_specformer.training.texts import Texts

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "benchmarks" / "prompts-load.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "slot-chances.json"
MODELS = ROOT / "examples" / "models"
FIRST, LAST = 48, 160  # lines of the prompts, as in the other comparisons
LONGEST = 256  # tokens of a prompt, its last

# vLLM's estimator (`acceptance_estimator.py`): where it starts, and how it learns.
START = (0.5, -0.2)
INTERVAL, DAMPING, RIDGE = 100, 50.0, 1e-3
REFITS = (0, 1, 2, 4, 8)

Round = tuple[NDArray[np.int64], Floats, Floats]


@dataclass
class Estimator:
    """vLLM's estimator in NumPy: one slope, an intercept per slot, refitted by damped Newton steps.

    `tests/engine/v2/test_adaptive_learning.py` holds it against vLLM's kernels.
    """

    slots: int
    start: tuple[float, float] = START
    slope: float = 0.0
    intercepts: Floats = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.slope, intercept = self.start
        self.intercepts = np.full(self.slots, intercept)

    def predict(self, slot: NDArray[np.int64], feature: Floats) -> Floats:
        """Chances of slots [N] with these log-odds [N]."""
        chances: Floats = 1 / (1 + np.exp(-(self.slope * feature + self.intercepts[slot])))
        return chances

    def refit(self, slot: NDArray[np.int64], feature: Floats, label: Floats) -> None:
        """One round, of slots [N] that were verified; label 1.0 for accepted drafts."""
        chances = self.predict(slot, feature)
        weight, residual = chances * (1 - chances), label - chances

        def per_slot(values: Floats) -> Floats:
            return np.bincount(slot, values, minlength=self.slots)

        count = per_slot(np.ones_like(feature))
        shared = float((weight * feature**2).sum()) + RIDGE
        mixed, own = per_slot(weight * feature), per_slot(weight) + RIDGE
        gradient = per_slot(residual)
        step = float((residual * feature).sum()) - float((mixed * gradient / own).sum())
        step /= shared - float((mixed * mixed / own).sum())
        step *= count.sum() / (count.sum() + DAMPING)
        if not (step == step and self.slope + step >= 0):
            step = 0.0
        self.slope += step
        self.intercepts += (gradient - mixed * step) / own * count / (count + DAMPING)


class Pair:
    """The bundled head and target."""

    def __init__(self, slots: int) -> None:
        place = MODELS / "python-target"
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.end_ids = end_token_ids(place)
        self.head = PackedHead.from_pretrained(
            MODELS / "python-specformer", dtype=torch.float32
        ).eval()
        self.target = HookedTarget(model, self.head.config.aux_hidden_state_layer_ids)
        self.slots = slots

    def observed(self, temperature: float, prompts: Sequence[str], tokens: int) -> Observed:
        """The head's drafts in the target's own answers."""
        requests = {
            number: Request(ids[-LONGEST:], temperature, 1.0, tokens, None)
            for number, ids in enumerate(self.tokenizer(list(prompts))["input_ids"])
        }
        made = answer(self.target.target, requests, self.end_ids, seed=0)
        texts = Texts.collect(made, LONGEST + tokens)
        return observe(self.head, self.target, texts, packed=False, slots=self.slots)


def rounds(seen: Observed, requests: int, rng: np.random.Generator) -> Iterator[Round]:
    """Rounds of verified slots without end: steps drawn at random, each up to its first refusal."""
    seen = seen.at(np.lexsort((seen.slot, seen.step, seen.text)))
    first = np.flatnonzero(seen.slot == 0)
    ends = np.append(first[1:], len(seen.slot))
    while True:
        taken, labels = [], []
        for step in rng.integers(len(first), size=requests * INTERVAL):
            for place in range(first[step], ends[step]):
                accepted = rng.random() < seen.chance[place]
                taken.append(place)
                labels.append(float(accepted))
                if not accepted:
                    break
        verified = seen.at(np.array(taken))
        yield verified.slot, verified.log_odds, np.array(labels)


def learned(
    estimator: Estimator, source: Iterator[Round], unseen: Observed, name: str
) -> list[dict[str, Any]]:
    """A row for each number of refits."""
    rows: list[dict[str, Any]] = []
    for refits in range(REFITS[-1] + 1):
        if refits:
            estimator.refit(*next(source))
        if refits in REFITS:
            found = errors(estimator.predict(unseen.slot, unseen.log_odds), unseen)
            rows.append({"chances": name, "refits": refits, **found})
    return rows


def calibrated(seen: Observed, calibration: Calibration) -> Observed:
    """With the log-odds that a calibration makes of them."""
    intercepts = np.array(calibration.intercepts)[seen.slot]
    return replace(seen, log_odds=calibration.slope * seen.log_odds + intercepts)


def compare(
    groups: dict[float, Observed], own: Calibrations, slots: int, requests: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows by temperature, a row per way of telling chances."""
    kind = {t: own.sampled if t else own.greedy for t in groups}
    halves = {t: seen.halves() for t, seen in groups.items()}
    fitted = {t: tuple(calibrated(half, kind[t]) for half in halves[t]) for t in groups}
    mixed = Observed.together([known for known, _ in _apart(halves)])
    mixed_fitted = Observed.together([known for known, _ in _apart(fitted)])
    results = {}
    for temperature, (known, unseen) in halves.items():
        own_known, own_unseen = fitted[temperature]
        plain = {
            "probability": Calibration.none(slots),
            "fit to the other half": fit(known, slots),
            "head's calibration": kind[temperature],
        }
        rows = [
            {"chances": name, **errors(chances_of(calibration, unseen), unseen)}
            for name, calibration in plain.items()
        ]
        for name, seen, other, start in (
            ("vLLM's", known, unseen, START),
            ("vLLM's from the head's", own_known, own_unseen, (1.0, 0.0)),
            ("vLLM's, mixed traffic", mixed, unseen, START),
            ("vLLM's from the head's, mixed traffic", mixed_fitted, own_unseen, (1.0, 0.0)),
        ):
            source = rounds(seen, requests, np.random.default_rng(0))
            rows += learned(Estimator(slots, start), source, other, name)
        results[f"{temperature:g}"] = rows
    return results


def _apart(halves: dict[float, tuple[Observed, ...]]) -> list[tuple[Observed, ...]]:
    """With numbers of steps that are different at every temperature."""
    return [
        tuple(replace(half, step=half.step + 10**9 * place) for half in pair)
        for place, pair in enumerate(halves.values())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--slots", type=int, default=4, help="drafted tokens")
    parser.add_argument("--requests", type=int, default=16, help="of a step")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[FIRST:LAST]
    prompts = [json.loads(line)["prompt"] for line in lines]
    pair = Pair(args.slots)
    groups = {t: pair.observed(t, prompts, args.tokens) for t in args.temperature}
    own = Calibrations.of(pair.head.config)
    results = compare(groups, own, args.slots, args.requests)
    for temperature, rows in results.items():
        for row in rows:
            name = f"{row['chances']} {row.get('refits', '')}"
            print(f"T={temperature} {name:40} ece {row['ece']:.3f} {row['log_loss']}")
    RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
