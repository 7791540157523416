"""Tokens per step of trees and of chains on held-out prompts: benchmarks/results/trees.json.

The bundled pair in float32, replayed by `specformer eval` on the prompts of prompts-load.jsonl that
its ranking was not fitted on. Rows that the engine has measured stay in the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import write_atomic
from vllm_specformer.evaluation.evaluate import evaluate
from vllm_specformer.evaluation.metrics import CHAIN, NODES, Metrics
from vllm_specformer.evaluation.report import print_report
from vllm_specformer.evaluation.settings import EvalSettings

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "examples" / "models"
RESULT = HERE / "results" / "trees.json"
PROMPTS = HERE / "prompts-load.jsonl"
FITTED = 48  # the first prompts, which the ranking is fitted on
REPLAY = "replay"


def rows(report: Metrics) -> list[dict[str, Any]]:
    """The file's rows out of an evaluation of answers of at most so many tokens."""
    found = []
    for group in report["offline"].values():
        rule = "coupled" if group["temperature"] else "greedy"
        for name, row in group["trees"].items():
            found.append(
                {
                    "rule": "chain, greedy drafts" if name.startswith(CHAIN) else rule,
                    "temperature": group["temperature"],
                    "nodes": int(name.removeprefix(CHAIN).removeprefix(NODES)),
                    "tokens_per_step": row["tokens_per_step"],
                    "stderr": row["stderr"],
                    "where": REPLAY,
                    "max_tokens": report["max_tokens"],
                }
            )
    return found


def merged(path: Path, new: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content with our rows new and all others as they were."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    length = new[0]["max_tokens"]
    kept = (row for row in old if row["where"] != REPLAY or row["max_tokens"] != length)
    return {"rows": [*new, *kept]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="fit the head's ranking first")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer; the engine's: 72")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    lines = PROMPTS.read_text().splitlines(keepends=True)
    held = HERE.parent / "build" / "trees"
    held.mkdir(parents=True, exist_ok=True)
    for name, part in (("fitted", lines[:FITTED]), ("held", lines[FITTED:])):
        (held / f"{name}.jsonl").write_text("".join(part))
    common: dict[str, Any] = {
        "head": MODELS / "python-specformer",
        "target": str(MODELS / "python-target"),
        "dtype": "float32",
        "num_speculative_tokens": (8,),
        "temperature": (0.0, 0.6, 1.0),
        "max_tokens": args.tokens,
    }
    if args.fit:
        evaluate(EvalSettings(prompts=(held / "fitted.jsonl",), fit_tree_ranking=True, **common))
    settings = EvalSettings(prompts=(held / "held.jsonl",), tree_nodes=(8, 16, 32, 63), **common)
    report = evaluate(settings)
    print_report(report)
    write_atomic(args.out, (json.dumps(merged(args.out, rows(report)), indent=1) + "\n").encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
