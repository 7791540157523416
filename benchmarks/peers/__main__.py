"""Train and replay all heads that are asked for: `make peers`, or

    python -m peers --budgets 240 --seeds 0 --kinds eagle3 specformer
    python -m peers --budgets 240 --serve   # and then in vLLM, heads of the longest budget
    python -m peers --again specformer      # our head anew, after a change of its training
    python -m peers --collect               # table, curves and document of what is there

What is there is not made again, and a training goes on from its last checkpoint, so the command may
be stopped at any time. Results: benchmarks/results/peers; the document is docs/peers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from peers import answers, report
from peers.plan import BUDGETS, KINDS, RESULTS, WORK, Head, heads
from peers.served import LOADS, ROUNDS, SERVED, Store, compare
from vllm_specformer.data.files import write_atomic

REPLAY = 60  # cpu-seconds that a replay and the start of two processes take, about
PROMPTS, HELD_OUT = 12_000, 96
Row = dict[str, Any]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), metavar="SECONDS")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="default: 0 and 1, with the longest budget 0"
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument(
        "--rates", type=float, nargs="+", help="times the library's; default: see peers/plan.py"
    )
    parser.add_argument("--again", nargs="+", default=[], choices=KINDS, help="train these anew")
    parser.add_argument("--serve", action="store_true", help="let vLLM draft with the heads, too")
    parser.add_argument("--loads", type=int, nargs="+", default=list(LOADS), choices=LOADS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of serving")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="to train on the answers of")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="prompts to replay")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=report.DOCUMENT, help="gets the tables")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    args = parser.parse_args(arguments)
    if args.serve and len(args.rates or ()) > 1:
        parser.error("--serve: give one of --rates")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    # Ends the training under way, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if not args.collect:
        answers.make(args.work, args.prompts, args.held_out)
        seeds = args.seeds and tuple(args.seeds)
        rates = args.rates and tuple(args.rates)
        asked = heads(tuple(args.budgets), seeds, tuple(args.kinds), rates)
        make(asked, args)
        if args.serve:
            serve(asked, args)
    report.write(args.results, args.document)


def make(asked: Sequence[Head], args: argparse.Namespace) -> None:
    """Train and replay what is missing, with one bar over all of it."""
    for head in asked:
        if head.kind in args.again:
            for name in (head.name, f".{head.name}.partial"):
                shutil.rmtree(args.work / "heads" / name, ignore_errors=True)
    todo = [head for head in asked if head.kind in args.again or not row_of(head, args.results)]
    with tqdm(total=sum(head.budget + REPLAY for head in todo), unit="cpu-s") as bar:
        for head in todo:
            bar.set_description(head.name)
            before = bar.n
            keep(one(head, args, bar), args.results)
            bar.update(before + head.budget + REPLAY - bar.n)
            report.write(args.results, args.document)


def serve(asked: Sequence[Head], args: argparse.Namespace) -> None:
    """Heads of the longest budget and the first seed, as far as the V1 runner has their kind."""
    last = max(asked, key=lambda head: (head.budget, -head.seed))
    chosen = [head for head in asked if (head.budget, head.seed) == (last.budget, last.seed)]
    places = {h.kind: args.work / "heads" / h.name for h in chosen if h.kind in SERVED}
    held = answers.read(args.work, answers.held_out(0.0))
    texts = [text.input_ids[: text.spans[0][0]].tolist() for text in held.each()]
    store = Store(args.results / report.SERVED, {"budget": last.budget, "seed": last.seed})
    compare(places, texts, args.loads, args.rounds, args.work / "logs", store)


def one(head: Head, args: argparse.Namespace, bar: tqdm) -> Row:
    """Train a head, which does nothing where it is complete, and replay it."""
    place, replayed = args.work / "heads" / head.name, args.work / f"replayed-{head.name}.json"
    if not (place / "training.json").is_file():
        module = ["peers.train_ours"] if head.is_ours else ["peers.train_peer", head.kind]
        limits = ["--seconds", str(head.budget), "--seed", str(head.seed)]
        limits += [] if head.is_ours else ["--rate", str(head.rate)]
        run([*module, *limits, "--data", args.work, "--out", place], args, head.name, bar)
    where = ["--head", place, "--data", args.work, "--out", replayed]
    run(["peers.replayed", head.kind, *where], args, head.name, bar)
    return {
        "kind": head.kind,
        "budget": head.budget,
        "seed": head.seed,
        "rate": head.rate,
        "training": json.loads((place / "training.json").read_text()),
        "replay": json.loads(replayed.read_text()),
    }


def run(command: Sequence[str | Path], args: argparse.Namespace, name: str, bar: tqdm) -> None:
    """A module in a process of its own, on one thread, the bar following its cpu-seconds."""
    log = args.work / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before = bar.n
    with log.open("a") as output:
        process = psutil.Popen(
            [sys.executable, "-m", *map(str, command)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                bar.update(before + cpu_seconds(process) - bar.n)
                time.sleep(1)
        finally:
            if process.poll() is None:
                process.kill()
    if process.returncode:
        raise SystemExit(f"{name}: ended with {process.returncode}; see {log}")


def cpu_seconds(process: psutil.Popen) -> int:
    """Whole ones, of a process that may have ended a moment ago."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0
    return int(times.user + times.system)


def row_of(head: Head, results: Path) -> Row | None:
    """The result of a head, if there is one."""
    rows = (row for row in report.read(results) if key(row) == head.key)
    return next(rows, None)


def key(row: Row) -> tuple[str, int, int, float]:
    return row["kind"], row["budget"], row["seed"], row["rate"]


def keep(row: Row, results: Path) -> None:
    """Write a head's result, in place of an earlier one."""
    rows = [other for other in report.read(results) if key(other) != key(row)]
    rows.append(row)
    rows.sort(key=lambda r: (r["budget"], r["seed"], KINDS.index(r["kind"]), r["rate"]))
    results.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"rows": rows}, indent=1) + "\n"
    write_atomic(results / report.HEADS, content.encode())


if __name__ == "__main__":
    main()
