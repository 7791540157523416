"""`specformer plan`: how many tokens to draft at each batch size (see docs/choosing-k.md)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_specformer.cli.arguments import json_object, positive, seconds, share, temperature
from vllm_specformer.cli.common import INTERRUPTED, check_results, fields_of, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument(
        "head",
        type=Path,
        nargs="?",
        metavar="HEAD",
        help="directory of the head; on paper it may be left out for one of the default shape",
    )
    what.add_argument("--target", help="directory or hub name; default: the one the head names")
    what.add_argument("--revision", help="branch, tag or commit of a model of the hub")
    what.add_argument(
        "--batch",
        nargs="+",
        type=positive,
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="B",
        help="requests in a step (1 2 4 8 16 32 64)",
    )
    what.add_argument(
        "--num-speculative-tokens",
        nargs="+",
        type=positive,
        default=[2, 4, 8],
        metavar="K",
        help="drafted tokens to choose from, besides none (2 4 8)",
    )
    accepted = parser.add_argument_group("acceptance")
    accepted.add_argument(
        "--eval", type=Path, metavar="FILE", help="what `specformer eval --json` wrote"
    )
    accepted.add_argument(
        "--accepted",
        nargs="+",
        type=share,
        default=(),
        metavar="SHARE",
        help="instead: the share of drafts accepted up to position 1, 2, ...",
    )
    accepted.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="of --eval to use (0)"
    )
    measured = parser.add_argument_group("costs, measured on this machine")
    measured.add_argument(
        "--prompts",
        nargs="+",
        type=Path,
        default=(),
        metavar="FILE",
        help="texts to measure with, in any form that `distill` takes; without --eval also the "
        "source of the acceptance",
    )
    measured.add_argument(
        "--max-prompts", type=positive, default=64, metavar="N", help="texts in use (64)"
    )
    measured.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="longest answer (128)"
    )
    measured.add_argument(
        "--cycles", type=positive, default=3, metavar="N", help="rounds over everything (3)"
    )
    measured.add_argument(
        "--steps", type=positive, default=8, metavar="N", help="timed steps of a visit (8)"
    )
    measured.add_argument(
        "--seconds",
        type=seconds,
        default=0.5,
        metavar="S",
        help="timed seconds of every figure in a round, by more visits where steps are short (0.5)",
    )
    measured.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="arguments of vLLM's engine, as the server will have them",
    )
    loaded = parser.add_argument_group("costs, measured under load")
    loaded.add_argument(
        "--bench",
        type=Path,
        metavar="FILE",
        help="bench.json of `specformer bench` with fixed numbers of drafts: choose by it, measure "
        "nothing",
    )
    paper = parser.add_argument_group("costs, on paper")
    paper.add_argument(
        "--chip", metavar="NAME", help="a100, h100, h200, b200 or mi300x: compute, measure nothing"
    )
    paper.add_argument(
        "--bandwidth", type=share, default=1.0, metavar="SHARE", help="of the peak reached (1)"
    )
    paper.add_argument(
        "--arithmetic", type=share, default=1.0, metavar="SHARE", help="of the peak reached (1)"
    )
    paper.add_argument(
        "--context", type=positive, default=1024, metavar="N", help="tokens in the cache (1024)"
    )
    paper.add_argument(
        "--weight-bytes",
        type=float,
        choices=(0.5, 1, 2, 4),
        default=2,
        help="of the target's weights: 1 for fp8 (2)",
    )
    out = parser.add_argument_group("results")
    out.add_argument(
        "--margin",
        type=share,
        default=0.02,
        metavar="SHARE",
        help="smallest gain to draft for (0.02)",
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write the plan, for `bench` too")
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw it (PNG)")


def run(options: argparse.Namespace) -> int:
    """Print the plan; exit code 0, 130 after Ctrl-C."""
    from vllm_specformer.data.files import write_atomic
    from vllm_specformer.places import lasting
    from vllm_specformer.planning.plan import Options, make_plan
    from vllm_specformer.planning.report import plot, print_plan

    check_results([options.json, options.plot])
    chosen = Options(**fields_of(options, Options))
    try:
        plan = make_plan(chosen, say=say)
    except KeyboardInterrupt:
        say("\ninterrupted; nothing was written")
        return INTERRUPTED
    head = lasting(options.head) if options.head else "HEAD"
    print_plan(plan, head)
    if options.json is not None:
        content = json.dumps(plan.to_json(head), indent=2) + "\n"
        write_atomic(options.json, content.encode())
    if options.plot is not None:
        write_atomic(options.plot, plot(plan))
    return 0
