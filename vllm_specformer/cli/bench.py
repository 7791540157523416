"""`specformer bench`: speculation under load, with real servers (see docs/benchmarking.md)."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from vllm_specformer.cli.arguments import json_object, positive, temperature
from vllm_specformer.cli.common import INTERRUPTED, fields_of, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("head", type=Path, metavar="HEAD", help="directory of the head")
    what.add_argument("--target", help="directory or hub name; default: the one the head names")
    what.add_argument("--revision", help="branch, tag or commit of a model of the hub")
    what.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results; a second call goes on"
    )
    arms = parser.add_argument_group("arms")
    arms.add_argument(
        "--arms",
        nargs="+",
        metavar="NAME",
        help="of none, again (a second server like it: how far apart equal servers come out), k1 "
        "to the head's slots, schedule, confident, ngram, suffix (default: all that can run but "
        "again, with the K of --num-speculative-tokens)",
    )
    arms.add_argument(
        "--num-speculative-tokens",
        nargs="+",
        type=positive,
        default=[2, 4, 8],
        metavar="K",
        help="fixed K of the arms that --arms does not name (2 4 8)",
    )
    arms.add_argument(
        "--schedule",
        type=Path,
        metavar="FILE",
        help="a plan of `specformer plan --json`, whose predictions are checked too, or a schedule",
    )
    arms.add_argument(
        "--speculative-config",
        action="append",
        type=_named_config,
        default=[],
        metavar="NAME=JSON",
        help="a further arm with any --speculative-config of vLLM; may be repeated",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--prompts",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="distinct texts or conversations, in any form that `distill` takes",
    )
    load.add_argument(
        "--concurrency",
        nargs="+",
        type=positive,
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="N",
        help="requests at a time (1 2 4 8 16 32 64)",
    )
    load.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="rounds of everything (3)"
    )
    load.add_argument(
        "--requests-per-slot",
        type=positive,
        default=4,
        metavar="N",
        help="requests of a measurement over requests at a time; at least 8, at most the prompts "
        "(4)",
    )
    load.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="longest answer (128)"
    )
    load.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="(0)")
    load.add_argument(
        "--ignore-eos", action="store_true", help="let every answer have --max-tokens tokens"
    )
    servers = parser.add_argument_group("servers")
    servers.add_argument(
        "--together",
        action="store_true",
        help="keep the servers of all arms up, where memory allows; otherwise one at a time",
    )
    servers.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help='options of `vllm serve` for all arms, such as \'{"dtype": "float32"}\'',
    )


def run(options: argparse.Namespace) -> int:
    """Measure and report; exit code 0, 130 after Ctrl-C."""
    from vllm_specformer.bench.compare import compare
    from vllm_specformer.bench.options import Options
    from vllm_specformer.bench.report import report
    from vllm_specformer.data.files import DiskFullError, write_errors
    from vllm_specformer.errors import SpecFormerError

    named = dict(options.speculative_config)
    if len(named) < len(options.speculative_config):
        raise SpecFormerError("--speculative-config: every NAME may be given once")
    options.speculative_config = named
    chosen = Options(**fields_of(options, Options))
    # Ending by SIGTERM has to pass through the blocks that end the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with write_errors():
            report(compare(chosen, say=say), options.out)
    except KeyboardInterrupt:
        say("\ninterrupted; what was measured is kept, the same command goes on")
        return INTERRUPTED
    except DiskFullError as error:
        raise DiskFullError(
            f"{error}. What was measured is kept, the same command goes on"
        ) from None
    return 0


def _named_config(text: str) -> tuple[str, dict[str, Any]]:
    name, equals, config = text.partition("=")
    if not equals or not name.replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"expected NAME=JSON, found {text!r}")
    return name, json_object(config)
