"""Write the model cards of the pair from the records the stages left behind."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

COMMAND = "make pair"


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def minutes(log: list[dict[str, Any]]) -> float:
    """Minutes over all runs of a log whose clock restarts when a run is resumed."""
    clock = [row["minutes_this_run"] for row in log if "minutes_this_run" in row]
    ends = [a for a, b in zip(clock, [*clock[1:], 0.0], strict=True) if b <= a]
    return round(sum(ends), 1)


def target_card(work: Path) -> str:
    corpus = json.loads((work / "corpus" / "manifest.json").read_text())
    pretraining = read_log(work / "target" / "log.jsonl")
    unloop = read_log(work / "unloop" / "log.jsonl")
    report = json.loads((work / "evaluation.json").read_text())
    origins = ", ".join(corpus["largest_origins_chars"])
    return f"""# python-target

A Qwen3-architecture language model of 5.2M parameters (6 layers of 256, vocabulary 2048) that
completes Python functions. It exists so that speculation can be shown and tested with real weights
on any machine. A prompt is a signature and, if you like, a docstring, without the line break after
it; the model ends its function by itself.

- **Data**: {corpus["counts"]["train"]["functions"]:,} functions
  ({corpus["counts"]["train"]["tokens"]:,} tokens) of the standard library and the packages
  installed beside this project; the largest origins are
  {origins}.
  Held out by file:
  {corpus["counts"]["held_out"]["functions"]:,} functions whose shape does not occur in training.
- **Training**: {pretraining[-1]["step"]:,} steps of 8,192 tokens
  ({pretraining[-1]["tokens"]:,} tokens), about {minutes(pretraining)} minutes on two shared CPU
  cores, then unlikelihood training against greedy loops (arXiv 1908.04319); seed 0.
- **Held-out loss**: {pretraining[-1]["held_out_loss"]} nats per token after training,
  {unloop[-1]["held_out_loss"]} after the loops were treated.
- **Greedy text** on {report["prompts"]} held-out prompts, at most {report["max_new_tokens"]} new
  tokens: {report["repeated_4grams"]:.1%} repeated 4-grams, {report["finished_share"]:.0%} finished
  by the model itself, {report["mean_answer_tokens"]} tokens on average.

Made by `{COMMAND}`. Weights are bfloat16 safetensors. The training text is source code under the
licences of its packages; the model is far too small to be used for anything but tests and demos.
"""


def table(figures: dict[str, Any], methods: dict[str, str]) -> str:
    budgets = list(next(iter(figures.values())))
    lines = ["| | " + " | ".join(budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for key, title in methods.items():
        cells = [f"{figures[key][b]['tokens_per_step']:.2f}" for b in budgets]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def head_card(work: Path, config: dict[str, Any]) -> str:
    log = read_log(work / "head" / "log.jsonl")
    report = json.loads((work / "evaluation.json").read_text())
    shards = len(list((work / "answers").glob("shard-*.npz")))
    both = {"head": "this head", "lookup_3": "3-gram lookup", "lookup_2_3": "2-3-gram lookup"}
    sampled = both | {"bound": "bound for deterministic drafts"}
    positions = report["greedy"]["head"]["K=8"]["acceptance_per_position"]
    return f"""# python-specformer

The SpecFormer head of [python-target](../python-target): {config["num_draft_slots"]} draft slots,
bonus-token embedding, slots that see the context ("{config["slot_mask"]}" mask), Markov term of
rank {config["markov_rank"]}, hooks at {config["aux_hidden_state_layer_ids"]}.

- **Data**: {shards} shards of 128 answers of the target itself to training prompts, three quarters
  greedy, one quarter at temperature 1 (self-distillation).
- **Training**: {log[-1]["step"]:,} steps of 32 texts with 20 anchors each, about {minutes(log)}
  minutes on two shared CPU cores; seed 0. Last smoothed loss per slot, nats
  (slots recorded):
  {", ".join(f"{x:.2f}" for x in log[-1]["slot_losses"] if math.isfinite(x))}.

Tokens per step (bonus included) on {report["prompts"]} held-out prompts, replayed exactly by
`evaluate.py`; K tokens drafted.

Greedy ({report["repeated_4grams"]:.1%} repeated 4-grams; {report["greedy_over_lookup"]:.2f} times
the better lookup at K=4):

{table(report["greedy"], both)}

Greedy, the less repetitive half of the texts:

{table(report["greedy_less_repetitive_half"], both)}

Temperature 1 ({report["temperature_1_share_of_bound"]:.0%} of the bound at K=4):

{table(report["temperature_1"], sampled)}

Acceptance per position, greedy, K=8: {", ".join(f"{x:.3f}" for x in positions)}.

Made by `{COMMAND}`; figures by
`python examples/training/bundled_pair/evaluate.py --target examples/models/python-target --head
examples/models/python-specformer --corpus build/pair/corpus`.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    args = parser.parse_args(argv)
    head = args.models / "python-specformer"
    config = json.loads((head / "config.json").read_text())
    (args.models / "python-target" / "README.md").write_text(target_card(args.work))
    (head / "README.md").write_text(head_card(args.work, config))


if __name__ == "__main__":
    main()
