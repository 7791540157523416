"""How well a slot's largest probability tells whether its draft is accepted.

    python benchmarks/slot_chances.py            # benchmarks/results/slot-chances.json; 2 minutes

Compared are the probability itself, vLLM's estimator of adaptive verification after so many of its
refits, and a fit to held-out answers. All but the first are chance = sigmoid(slope * log-odds +
intercept of the slot). Half of the texts are learned from, errors are those of the other half. The
features are what a head tells on the V2 runner, along its best tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "benchmarks" / "prompts-load.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "slot-chances.json"
MODELS = ROOT / "examples" / "models"
FIRST, LAST = 48, 160  # lines of the prompts, as in the other comparisons

# vLLM's estimator (`acceptance_estimator.py`): where it starts, and how it learns.
START = (0.5, -0.2)
INTERVAL, DAMPING, RIDGE, MOST = 100, 50.0, 1e-3, 40.0
REFITS = (0, 1, 2, 4, 8)
FITTED = 40  # refits after which nothing moves any more
BINS = 10

Floats = NDArray[np.float64]


@dataclass
class Estimator:
    """vLLM's estimator in NumPy: one slope, an intercept per slot, refitted by damped Newton steps.

    `tests/engine/v2/test_adaptive_learning.py` holds it against vLLM's kernels.
    """

    slots: int
    slope: float = START[0]
    intercepts: Floats = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.intercepts = np.full(self.slots, START[1])

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


@dataclass
class Slots:
    """N slots of drafts: their number, log-odds, chance by the text, and weight, by text and step.

    Attributes:
        weight: chance that all drafts before the slot are accepted.
    """

    slot: NDArray[np.int64]
    feature: Floats
    chance: Floats
    weight: Floats
    step: NDArray[np.int64]
    text: NDArray[np.int64]

    def at(self, where: NDArray[Any]) -> Slots:
        return Slots(*(values[where] for values in vars(self).values()))


def log_odds(log_probability: Tensor) -> Tensor:
    """log(q / (1 - q)) of log q, within vLLM's bounds."""
    rest = -torch.expm1(log_probability.double())
    return (log_probability.double() - rest.log()).clamp(-MOST, MOST)


@torch.no_grad()
def slots_of(
    head: SpecFormerHead,
    target: HookedTarget,
    text: Sequence[int],
    start: int,
    count: int,
    t: float,
) -> list[tuple[float, ...]]:
    """Slot, log-odds, chance, weight and anchor of every draft in an answer that begins at `start`.

    A drawn draft is accepted with the overlap of p and q, a greedy one if the text goes on with it;
    a text's own token came of an accepted draft with min(1, q / p).
    """
    ids = torch.tensor([list(text)])
    anchors = torch.arange(start - 1, len(text) - count - 2)
    states, _ = target(ids)
    bonus = target.embed(ids[0, anchors + 1][None])
    running = head.slots_to_run(count)
    slots = head(states, anchors[None], bonus, running)
    logits = head.scored(target.logits(slots))[0, :, :count]
    best = previous = ids[0, anchors + 1]
    weight = torch.ones(len(anchors))
    rows = []
    wanted = target.target(ids).logits[0] / (t or 1)
    for slot in range(count):
        along = logits[:, slot] + (head.markov_logits(best) if head.config.markov_rank else 0)
        drawn = logits[:, slot] + (head.markov_logits(previous) if head.config.markov_rank else 0)
        feature = log_odds((along / (t or 1)).log_softmax(-1).amax(-1))
        best = head.to_tokens(along.argmax(-1))
        token = ids[0, anchors + 2 + slot]
        if t:
            p = wanted[anchors + 1 + slot].softmax(-1)
            q = head.over_vocabulary(drawn / t, float("-inf")).softmax(-1)
            chance = torch.minimum(p, q).sum(-1)
            ratio = (q / p.clamp(min=1e-30)).gather(1, token[:, None])[:, 0].clamp(max=1)
        else:
            chance = ratio = (best == token).float()
        columns = (feature, chance, weight, anchors)
        rows += [(slot, *row) for row in zip(*(c.tolist() for c in columns), strict=True)]
        weight, previous = weight * ratio, token
    return rows


def collect(temperature: float, prompts: Sequence[str], tokens: int, count: int) -> Slots:
    """The slots of the bundled head in the bundled target's own answers."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / "python-target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "python-target")
    head = SpecFormerHead.from_pretrained(MODELS / "python-specformer", dtype=torch.float32).eval()
    target = HookedTarget(model, head.config.aux_hidden_state_layer_ids)
    torch.manual_seed(0)
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    rows: list[tuple[float, ...]] = []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"][:, -256:]
        made = model.generate(ids, max_new_tokens=tokens, **(drawing or {"do_sample": False}))[
            0
        ].tolist()
        if len(made) > ids.shape[1] + count + 2:
            found = slots_of(head, target, made, ids.shape[1], count, temperature)
            rows += [(*row, number) for row in found if row[3] > 0]
    slot, feature, chance, weight, step, text = np.array(rows).T
    whole = [values.astype(np.int64) for values in (slot, step, text)]
    return Slots(whole[0], feature, chance, weight, whole[1], whole[2])


def errors(found: Floats, slots: Slots) -> dict[str, float]:
    """Expected calibration error over equal bins, and log loss, by the slots' weights."""
    bins = np.minimum((found * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, slots.weight * (found - slots.chance), minlength=BINS)
    sure = found.clip(1e-9, 1 - 1e-9)
    losses = -(slots.chance * np.log(sure) + (1 - slots.chance) * np.log(1 - sure))
    total = slots.weight.sum()
    return {
        "ece": round(float(np.abs(gaps).sum() / total), 4),
        "log_loss": round(float((slots.weight * losses).sum() / total), 4),
    }


def rounds(slots: Slots, requests: int, rng: np.random.Generator) -> Any:
    """Rounds of verified slots without end: steps drawn at random, each up to its first refusal."""
    order = np.lexsort((slots.slot, slots.step, slots.text))
    slots = slots.at(order)
    first = np.flatnonzero(slots.slot == 0)
    ends = np.append(first[1:], len(slots.slot))
    while True:
        taken, labels = [], []
        for step in rng.integers(len(first), size=requests * INTERVAL):
            for place in range(first[step], ends[step]):
                accepted = rng.random() < slots.chance[place]
                taken.append(place)
                labels.append(float(accepted))
                if not accepted:
                    break
        seen = slots.at(np.array(taken))
        yield seen.slot, seen.feature, np.array(labels)


def compare(slots: Slots, count: int, requests: int) -> list[dict[str, Any]]:
    """A row per way of telling chances."""
    half = np.median(np.unique(slots.text))
    known, unseen = slots.at(slots.text <= half), slots.at(slots.text > half)
    raw = 1 / (1 + np.exp(-unseen.feature))
    rows = [{"chances": "largest probability", **errors(raw, unseen)}]
    estimator, done = Estimator(count), 0
    source = rounds(known, requests, np.random.default_rng(0))
    for refits in (*REFITS, FITTED):
        for _ in range(refits - done):
            estimator.refit(*next(source))
        done = refits
        name = "fit to held-out answers" if refits == FITTED else f"vLLM's, {refits} refits"
        found = errors(estimator.predict(unseen.slot, unseen.feature), unseen)
        coefficients = [estimator.slope, *estimator.intercepts]
        rows.append({"chances": name, **found, "coefficients": np.round(coefficients, 3).tolist()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--slots", type=int, default=4, help="drafted tokens")
    parser.add_argument("--requests", type=int, default=16, help="of a step")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[FIRST:LAST]
    prompts = [json.loads(line)["prompt"] for line in lines]
    results = {}
    for temperature in args.temperature:
        slots = collect(temperature, prompts, args.tokens, args.slots)
        rows = results[f"{temperature:g}"] = compare(slots, args.slots, args.requests)
        for row in rows:
            print(f"T={temperature:g} {row['chances']:24} ece {row['ece']:.3f}", row["log_loss"])
    RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
