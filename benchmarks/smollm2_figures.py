"""Tokens per step of the SmolLM2 head by kind of question: results/smollm2.json, docs/smollm2.md.

    python benchmarks/smollm2_figures.py [--render]

The questions are the demo's (examples/server/chats.jsonl), which no training has seen. Replayed in
float32, as the demo serves both; greedy, and sampled at temperatures 0.7 and 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import write_atomic
from vllm_specformer.evaluation.evaluate import evaluate
from vllm_specformer.evaluation.metrics import ALL, HALF, better_lookup, served_method
from vllm_specformer.evaluation.report import print_report
from vllm_specformer.evaluation.settings import EvalSettings

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "examples" / "models"
HEAD = MODELS / "smollm2-specformer"
CHATS = HERE.parent / "examples" / "server" / "chats.jsonl"
RESULT = HERE / "results" / "smollm2.json"
DOCUMENT = HERE.parent / "docs" / "smollm2.md"
BEGIN, END = "<!-- made by benchmarks/smollm2_figures.py: begin -->", "<!-- end -->"
BUDGETS = (1, 2, 4, 8)
SHOWN = "K=4"


def table(head: list[str], body: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)] + [""]


def speed(part: dict[str, Any], k: str = SHOWN) -> str:
    return f"{part[served_method(part)][k]['tokens_per_step']:.2f}"


def document(groups: dict[str, Any]) -> str:
    """Tables of what an evaluation found at each temperature."""
    text, body = [], []
    titles = [f"T={group['temperature']:g}" for group in groups.values()]
    for k in (f"K={count}" for count in BUDGETS):
        body.append([k, *(speed(group[ALL], k) for group in groups.values())])
    body.append(["the better lookup, K=4"])
    body[-1] += [f"{better_lookup(group[ALL], SHOWN):.2f}" for group in groups.values()]
    count = next(iter(groups.values()))["texts"]
    text += [f"Tokens per step on {count} questions:", "", *table(["", *titles], body)]

    columns = [f"{title}{what}" for title in titles for what in ("", ", lookup")]
    body = []
    for kind in next(iter(groups.values()))["by_kind"]:
        cells = []
        for group in groups.values():
            part = group["by_kind"][kind][ALL]
            cells += [speed(part), f"{better_lookup(part, SHOWN):.2f}"]
        body.append([kind, *cells])
    means = [group["mean_over_kinds"][SHOWN] for group in groups.values()]
    body.append(["mean of kinds"])
    body[-1] += [f"{m[name]:.2f}" for m in means for name in ("head", "better_lookup")]
    body.append(["less repetitive half of all"])
    for group in groups.values():
        body[-1] += [speed(group[HALF]), f"{better_lookup(group[HALF], SHOWN):.2f}"]
    text += ["By kind, K=4, beside the better prompt lookup on the same texts:", ""]
    text += table(["", *columns], body)
    return "\n".join(text)


def render() -> None:
    groups = json.loads(RESULT.read_text())["offline"]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    write_atomic(DOCUMENT, f"{before}{BEGIN}\n\n{document(groups)}\n{END}{after}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--render", action="store_true", help="measure nothing")
    if not parser.parse_args().render:
        report = evaluate(
            EvalSettings(
                head=HEAD,
                target=str(MODELS / "smollm2-target"),
                prompts=(CHATS,),
                num_speculative_tokens=BUDGETS,
                temperature=(0.0, 0.7, 1.0),
                max_tokens=128,
                dtype="float32",
            )
        )
        print_report(report)
        kept = {name: report[name] for name in ("dtype", "max_tokens", "versions", "offline")}
        write_atomic(RESULT, (json.dumps(kept, indent=1) + "\n").encode())
    render()


if __name__ == "__main__":
    main()
