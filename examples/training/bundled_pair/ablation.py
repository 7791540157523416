"""What each part of the head and of its training brings: one head per arm and seed.

    make ablation                                      # bundled pair; hours on two cores
    python ablation.py --steps 20 --seeds 0 --arms base paper    # a look at it
    python ablation.py --collect                       # table and plot of what is there

All heads see the same texts in the same number of steps. What is missing of the data is made first,
by the recipe of the bundled pair. A head that is complete is not trained again, so the command may
be interrupted at any time; it runs seed by seed, so that a first seed of all arms is there early.
Results: benchmarks/results/ablation.csv, one row per head, ablation.png and ablation.md, and
losses.csv and so on for the ways of training. Rows of heads that were not asked for stay.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ablation_report import BASE, DEFAULTS, write_plot, write_table
from safetensors import safe_open
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "examples" / "models" / "python-target"
COMMAND = (sys.executable, "-m", "vllm_specformer.cli.main")
BUDGETS = (2, 4, 8)
KINDS = ("greedy", "sampled")  # of the held-out answers

_ALL = ("--preset", "paper", "--bonus-embedding", "--slot-mask", "mixed", "--markov-rank", "64")
# Arm -> options of `specformer train`, in the order of the table. Later options win. All of these
# have the rates that were the default when the first of them were trained.
PARTS: dict[str, tuple[str, ...]] = {
    # Parts of the head, each alone on top of the paper's, then together.
    "paper": _ALL[:2],
    "paper + bonus": _ALL[:3],
    "paper + mixed mask": (*_ALL[:2], *_ALL[3:5]),
    "paper + Markov": (*_ALL[:2], *_ALL[5:]),
    "paper + all three": _ALL,
    BASE: (),  # all three, and trained with varying numbers of slots
    # The rest changes one thing of the base each.
    "no Markov": ("--markov-rank", "0"),
    "Markov, rank 16": ("--markov-rank", "16"),
    "hook: last": ("--hooks", "6"),
    "hooks: last two": ("--hooks", "5,6"),
    "hooks: 1, 3, 5": ("--hooks", "1,3,5"),
    "hooks: all seven": ("--hooks", "0,1,2,3,4,5,6"),
    "4 slots": ("--slots", "4"),
    "16 slots": ("--slots", "16"),
    "slots weigh alike": ("--slot-weights", "uniform"),
    "slots weigh 0.7^i": ("--slot-weights", ",".join(f"{0.7**i:.4f}" for i in range(8))),
    "half KL": ("--kl-weight", "0.5"),
    "all KL": ("--kl-weight", "1"),
    "2 slot layers": ("--slot-layers", "2"),
    "draft vocabulary 1,024": ("--draft-vocab", "1024"),
    "draft vocabulary 512": ("--draft-vocab", "512"),
    "AdamW": ("--optimizer", "adamw"),
    "feed-forward twice as wide": ("--intermediate-size", "1536"),
}
_OLD_RATES = ("--learning-rate", "0.02", "--vector-learning-rate", "0.002")
# Losses and rates, each beside the defaults of `specformer train`. The heads are of one shape.
LOSSES: dict[str, tuple[str, ...]] = {
    DEFAULTS: (),
    "all cross entropy": ("--kl-weight", "0"),
    "half TV": ("--tv-weight", "0.5"),
    "0.9 TV": ("--tv-weight", "0.9"),
    "0.3 KL, 0.3 TV": ("--kl-weight", "0.3", "--tv-weight", "0.3"),
    "half LK": ("--lk-weight", "0.5"),
    "0.9 LK": ("--lk-weight", "0.9"),
    "by reach": ("--slot-weights", "reach"),
    "twice the rate": _OLD_RATES,
    "half the rate": ("--learning-rate", "0.005", "--vector-learning-rate", "0.002"),
}
ARMS = PARTS | LOSSES
TABLES = {"ablation": PARTS, "losses": LOSSES}  # files of results


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    heads = [(seed, arm) for seed in args.seeds for arm in args.arms]
    if args.collect:
        heads = [(seed, arm) for seed, arm in heads if figures(place(arm, seed, args)).exists()]
        if not heads:
            raise SystemExit(f"{args.work} holds no complete head; leave out --collect")
    else:
        recipe(args.pair)
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(one, arm, seed, args): (seed, arm) for seed, arm in heads}
        try:
            for done in tqdm(as_completed(running), total=len(heads), desc="heads", unit="head"):
                rows[running[done]] = done.result()
                write_results([rows[head] for head in heads if head in rows], args)
        finally:
            pool.shutdown(cancel_futures=True)
    # Times are taken last, when no other head is being trained, once per shape of a head.
    arms = [arm for arm in dict.fromkeys(arm for _, arm in heads) if arm in PARTS]
    for arm in tqdm(arms, desc="draft steps", unit="arm"):
        seeds = [seed for seed, other in heads if other == arm]
        milliseconds = draft_milliseconds(place(arm, seeds[0], args))
        for seed in seeds:
            rows[seed, arm]["draft_ms"] = milliseconds
    write_results([rows[head] for head in heads], args)
    return 0


def place(arm: str, seed: int, args: argparse.Namespace) -> Path:
    work: Path = args.work
    return work / f"{re.sub(r'[^a-z0-9.^]+', '-', arm.lower())}-seed{seed}"


def figures(head: Path) -> Path:
    """The row of a head that is trained and measured."""
    return head / "ablation.json"


def one(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a head, which does nothing where it is complete, and measure it."""
    head = place(arm, seed, args)
    if not args.collect:
        train(head, arm, seed, args)
    settings = json.loads((head / "provenance.json").read_text())["settings"]
    return {"arm": arm, "seed": seed, "steps": settings["max_steps"]} | measure(head, args)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", type=Path, default=ROOT / "build" / "pair")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "ablation")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--anchors-per-text", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="at a time")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--prompts", type=int, default=192, help="held-out ones per evaluation")
    return parser.parse_args(arguments)


def recipe(pair: Path) -> None:
    """The data, made by the recipe of the bundled pair if it is not there."""
    build = Path(__file__).with_name("build.py")
    subprocess.run([sys.executable, str(build), "--work", str(pair), "--data-only"], check=True)


def run(*options: str | Path) -> None:
    """One subcommand of `specformer`, silent unless it fails; one thread, so seeds repeat."""
    command = [*COMMAND, *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def train(head: Path, arm: str, seed: int, args: argparse.Namespace) -> None:
    options = {
        "--target": TARGET,
        "--data": args.pair / "answers",
        "--out": head,
        "--max-steps": args.steps,
        "--batch-tokens": args.batch_tokens,
        "--anchors-per-text": args.anchors_per_text,
        "--eval-every": args.steps,
        "--dtype": "bfloat16",
        "--seed": seed,
    }
    if arm in PARTS and not arm.startswith("paper"):
        options |= {"--markov-rank": 64, "--kl-weight": 0}
    given = [str(part) for item in options.items() for part in item]
    if arm in PARTS:
        given += ["--no-markov-gate", *(() if arm == "AdamW" else _OLD_RATES)]
    run("train", *given, *ARMS[arm])


def measure(head: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row of figures about a trained head; kept beside it."""
    known = figures(head)
    if known.exists():
        row: dict[str, Any] = json.loads(known.read_text())
        return row
    slots = json.loads((head / "config.json").read_text())["num_draft_slots"]
    greedy, sampled = (
        evaluate(head, args.pair / f"held_out_{kind}", slots, args.prompts) for kind in KINDS
    )
    texts = greedy["offline"]["greedy"]
    row = {"parameters": parameters(head), "draft_ms": None}
    for k in BUDGETS:
        row[f"tokens_per_step_k{k}"] = tokens_per_step(texts["all"], "head", k)
    row["less_repetitive_half_k4"] = tokens_per_step(texts["less_repetitive_half"], "head", 4)
    row["lookup_3_k4"] = tokens_per_step(texts["all"], "lookup_3", 4)
    row["lookup_3_less_repetitive_half_k4"] = tokens_per_step(
        texts["less_repetitive_half"], "lookup_3", 4
    )
    at_one = sampled["offline"]["temperature_1"]
    row["temperature_1_k4"] = tokens_per_step(at_one["all"], "head", 4)
    row["share_of_bound_k4"] = at_one["share_of_bound"]["K=4"]
    known.write_text(json.dumps(row) + "\n")
    return row


def evaluate(head: Path, data: Path, slots: int, prompts: int) -> dict[str, Any]:
    result = head / f"eval-{data.name}.json"
    budgets = [str(k) for k in BUDGETS if k <= slots]
    run(
        "eval", head, "--target", TARGET, "--data", data, "--json", result,
        "--max-prompts", str(prompts), "--num-speculative-tokens", *budgets,
    )  # fmt: skip
    evaluated: dict[str, Any] = json.loads(result.read_text())
    return evaluated


def tokens_per_step(group: dict[str, Any], method: str, k: int) -> float | None:
    """None where the head has fewer slots."""
    found = group[method].get(f"K={k}")
    return found and found["tokens_per_step"]


def parameters(head: Path) -> int:
    with safe_open(head / "model.safetensors", "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]
    return sum(math.prod(shape) for shape in shapes)


def draft_milliseconds(head: Path) -> float:
    """Of a draft, K=4, for 16 requests with 512 tokens of context, on one thread and its clock."""
    script = ROOT / "benchmarks" / "step_profile.py"
    where = ("--target", TARGET, "--head", head, "--results", head, "--name", "draft")
    what = ("--arms", "4", "--requests", "16", "--context", "512", "--dtype", "float32")
    command = [sys.executable, script, *where, *what, "--clock", "thread"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    found = json.loads((head / "step-profile-draft.json").read_text())
    seconds: float = found["seconds"]["K=4"]["16"]["draft"]
    return round(1000 * seconds, 2)


def write_results(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    args.results.mkdir(parents=True, exist_ok=True)
    for name, arms in TABLES.items():
        own = [row for row in rows if row["arm"] in arms]
        if not own:
            continue
        table = args.results / f"{name}.csv"
        own = beside_earlier(own, table)
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, own[0].keys())
            writer.writeheader()
            writer.writerows(own)
        write_table(own, args.results / f"{name}.md")
        write_plot(own, args.results / f"{name}.png")


def beside_earlier(rows: Sequence[dict[str, Any]], table: Path) -> list[dict[str, Any]]:
    """`rows` and those of other heads that a table has, arm by arm; numbers as numbers."""
    every = {(row["arm"], row["seed"]): row for row in read_results(table)}
    every |= {(row["arm"], row["seed"]): row for row in rows}
    order = list(ARMS)
    return sorted(every.values(), key=lambda row: (order.index(row["arm"]), row["seed"]))


def read_results(table: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run; arms that the script no longer has are left out."""
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] in ARMS]
    for row in rows:
        for name, value in row.items():
            if name != "arm":
                row[name] = json.loads(value) if value else None
    return rows


if __name__ == "__main__":
    sys.exit(main())
