"""`specformer eval`: what a head is worth, offline and in the engine (see docs/training.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_specformer.cli.arguments import count, json_object, positive, temperature
from vllm_specformer.cli.common import INTERRUPTED, check_results, fields_of, say, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("head", type=Path, metavar="HEAD", help="directory of the head")
    what.add_argument("--target", help="directory or hub name; default: the one the head names")
    what.add_argument("--revision", help="branch, tag or commit of a model of the hub")
    texts = what.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--prompts",
        nargs="+",
        type=Path,
        default=(),
        metavar="FILE",
        help="prompts the head has not seen, in any form that `distill` takes; the target answers "
        "the first question of each",
    )
    texts.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="distilled answers; if the head was trained on them, the part held out",
    )
    what.add_argument(
        "--max-prompts", type=positive, default=256, metavar="N", help="texts in use (256)"
    )
    what.add_argument("--max-bad-lines", type=count, metavar="N", help="as for `distill`")
    what.add_argument("--chat-template", type=Path, metavar="FILE", help="as for `distill`")
    what.add_argument(
        "--chat-template-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="as for `distill`",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--num-speculative-tokens",
        nargs="+",
        type=positive,
        metavar="K",
        help="drafted tokens per step (all from 1 to the head's slots; the engine: 4 and all)",
    )
    how.add_argument(
        "--temperature",
        nargs="+",
        type=temperature,
        metavar="T",
        help="of the answers (0; with --data those it has)",
    )
    how.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="longest answer (128)"
    )
    how.add_argument("--seed", type=int, default=0, help="of drawing prompts and answers (0)")
    how.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of target and head, in the engine too (auto: the target's on a GPU, else float32)",
    )
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    engine = parser.add_argument_group("the engine")
    engine.add_argument(
        "--engine",
        action="store_true",
        help="let vLLM answer the prompts with the head, and compare its steps with the replay's; "
        "exit code 1 if they differ by more than 2%%",
    )
    engine.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON", help="as for `distill`"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw them (PNG)")


def run(options: argparse.Namespace) -> int:
    """Evaluate; exit code 0, 1 if the engine disagrees with the replay, 130 after Ctrl-C."""
    from vllm_specformer.data.files import write_atomic
    from vllm_specformer.evaluation.evaluate import Options, evaluate
    from vllm_specformer.evaluation.report import plot, print_report

    check_results([options.json, options.plot])
    try:
        report = evaluate(Options(**fields_of(options, Options)), say=say)
    except KeyboardInterrupt:
        say("\ninterrupted; nothing was written")
        return INTERRUPTED
    print_report(report)
    if options.json is not None:
        write_json(options.json, report)
    if options.plot is not None:
        write_atomic(options.plot, plot(report))
    return 0 if all(row["agrees"] for row in report["engine"]) else 1
