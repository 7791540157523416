"""What decides what is verified, on paper: fixed K, schedule, adaptive verification, trees.

    specformer eval examples/models/python-specformer --prompts build/held.jsonl --dtype float32 \\
        --temperature 0 1 --num-speculative-tokens 2 4 8 --likeliest --tree-nodes 2 4 8 16 32 63 \\
        --json build/mechanisms-eval.json
    python benchmarks/mechanisms.py build/mechanisms-eval.json   # a second

Tokens per second of Qwen3-8B in bfloat16, a head as `specformer train` makes it, by the roofline
of `specformer plan`; acceptance as in the evaluation. Nothing of it is measured. Writes
benchmarks/results/mechanisms.json and prints the table of docs/gpu-predictions.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vllm_specformer.candidates import BEAM
from vllm_specformer.planning.acceptance import from_evaluation, kept_of_evaluation
from vllm_specformer.planning.chips import CHIPS
from vllm_specformer.planning.choose import MARGIN
from vllm_specformer.planning.paper import rows_on_paper
from vllm_specformer.planning.plan_file import Plan
from vllm_specformer.planning.trees import trees_of
from vllm_specformer.shapes import HeadShape, TargetShape

RESULT = Path(__file__).parent / "results" / "mechanisms.json"
TARGET = TargetShape(36, 4096, 32, 8, 128, 12288, 151_936)  # Qwen3-8B
# Without gates, as the bundled head is, whose acceptance is taken.
HEAD = replace(HeadShape.default_for(TARGET), markov_gate=False)
NAMES = ("h100", "h200", "b200", "mi300x")
CONTEXTS = (1024, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COUNTS = (0, 2, 4, 8)
# Shares of the data sheets' peaks that plain copies and matrix products once reached on an H200.
BANDWIDTH, ARITHMETIC = 0.9, 0.78
SHOWN = (1, 16, 64, 256, 512)


def plans(evaluation: Path, temperature: float) -> Iterator[tuple[str, int, Plan]]:
    """A plan for each chip and context."""
    accepted = from_evaluation(evaluation, COUNTS, temperature)
    kept = kept_of_evaluation(evaluation, temperature)
    for name in NAMES:
        chip = CHIPS[name].derated(BANDWIDTH, ARITHMETIC)
        for context in CONTEXTS:
            costs = partial(rows_on_paper, chip, TARGET, HEAD, BATCHES, context=context)
            rows = costs(accepted)
            trees = trees_of(evaluation, temperature, rows, partial(costs, beam=BEAM))
            yield name, context, Plan.of(rows, {}, MARGIN, trees[:1], kept)


def table(rows: list[dict[str, Any]], temperature: float) -> str:
    """Gains over no speculation: K / schedule / adaptive / tree."""
    lines = [
        f"| temperature {temperature:g} | context | {' | '.join(map(str, SHOWN))} requests |",
        f"|---|---|{'---|' * len(SHOWN)}",
    ]
    for row in rows:
        if row["temperature"] != temperature:
            continue
        cells = []
        for batch in SHOWN:
            rates = row["tokens_per_second"][batch]
            ratios = [rates[name] / rates["none"] for name in rates if name != "none"]
            best = max(ratios)
            cells.append(" / ".join(f"**{r:.2f}**" if r == best else f"{r:.2f}" for r in ratios))
        lines.append(f"| {row['chip']} | {row['context'] // 1024}k | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("evaluation", type=Path, help="what the command above wrote")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for temperature in args.temperature:
        for chip, context, plan in plans(args.evaluation, temperature):
            rates = {
                batch: {name: round(rate, 1) for name, rate in found.items()}
                for batch, found in plan.mechanisms().items()
            }
            about = {"temperature": temperature, "chip": chip, "context": context}
            rows.append(about | {"fixed": plan.fixed_count, "tokens_per_second": rates})
        print(table(rows, temperature), end="\n\n")
    content = {
        "what": "on paper: Qwen3-8B, bfloat16, a head of the default shape with a Markov term",
        "shares_of_peaks": {"bandwidth": BANDWIDTH, "arithmetic": ARITHMETIC},
        "accepted": {
            f"{t:g}": from_evaluation(args.evaluation, COUNTS, t) for t in args.temperature
        },
        "kept_of_likeliest": {
            f"{t:g}": kept_of_evaluation(args.evaluation, t) for t in args.temperature
        },
        "rows": rows,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
