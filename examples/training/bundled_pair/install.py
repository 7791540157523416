"""Put the new head, or pair, where demo, tests and benchmarks take it from, with model cards."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

PAIR_COMMAND = "make pair"
HEAD_COMMAND = "python examples/training/bundled_pair/build.py --keep-target"
HEAD_FILES = ("config.json", "model.safetensors", "provenance.json")
METHODS = {
    "head": "this head",
    "lookup_3": "3-gram lookup",
    "lookup_2_3": "2-3-gram lookup",
    "bound": "bound for deterministic drafts",
}
BUDGETS = ("K=1", "K=2", "K=4", "K=8")


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def minutes(log: list[dict[str, Any]]) -> float:
    """Minutes over all runs of a log whose clock restarts when a run is resumed."""
    clock = [row["minutes_this_run"] for row in log if "minutes_this_run" in row]
    ends = [a for a, b in zip(clock, [*clock[1:], 0.0], strict=True) if b <= a]
    return round(sum(ends), 1)


def figures(work: Path, kind: str) -> dict[str, Any]:
    """What `specformer eval` found on one kind of held-out answers."""
    groups: dict[str, Any] = json.loads((work / f"eval-{kind}.json").read_text())["offline"]
    (found,) = groups.values()
    return dict(found)


def target_card(work: Path) -> str:
    corpus = json.loads((work / "corpus" / "manifest.json").read_text())
    pretraining = read_log(work / "target" / "log.jsonl")
    unloop = read_log(work / "unloop" / "log.jsonl")
    texts = figures(work, "greedy")
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
- **Greedy text** on {texts["texts"]} held-out prompts: {texts["repeated_4grams"]:.1%} repeated
  4-grams, {texts["finished_share"]:.0%} finished by the model itself, {texts["mean_answer_tokens"]}
  tokens on average.

Made by `{PAIR_COMMAND}`. Weights are bfloat16 safetensors. The training text is source code under
the licences of its packages; the model is far too small for anything but tests and demos.
"""


def table(figures: dict[str, Any]) -> str:
    lines = ["| | " + " | ".join(BUDGETS) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
    for key, title in METHODS.items():
        if key in figures:
            cells = [f"{figures[key][b]['tokens_per_step']:.2f}" for b in BUDGETS]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def held_out_section(work: Path, command: str) -> str:
    """What the card that training wrote cannot know: figures on prompts from unseen files."""
    greedy, sampled = figures(work, "greedy"), figures(work, "sampled")
    return f"""
## Held-out prompts
Tokens per step by number K of drafted tokens, replayed exactly by `specformer
eval` on answers to {greedy["texts"]} prompts from files that neither target nor head has seen.

Greedy ({greedy["repeated_4grams"]:.1%} repeated 4-grams; {greedy["over_lookup"]["K=4"]:.2f} times
the better lookup at K=4):

{table(greedy["all"])}

Greedy, the less repetitive half of the texts:

{table(greedy["less_repetitive_half"])}

Temperature 1 ({sampled["share_of_bound"]["K=4"]:.0%} of the bound at K=4):

{table(sampled["all"])}

Made by `{command}`.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--target", action="store_true", help="a new target too")
    args = parser.parse_args(argv)
    target, head = args.models / "python-target", args.models / "python-specformer"
    if args.target:
        shutil.copytree(args.work / "unloop" / "model", target, dirs_exist_ok=True)
        (target / "README.md").write_text(target_card(args.work))
    head.mkdir(exist_ok=True)
    for name in HEAD_FILES:
        shutil.copy2(args.work / "head" / name, head / name)
    card = (args.work / "head" / "README.md").read_text()
    command = PAIR_COMMAND if args.target else HEAD_COMMAND
    (head / "README.md").write_text(card + held_out_section(args.work, command))


if __name__ == "__main__":
    main()
