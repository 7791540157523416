"""`specformer enlarge`: a heavier target with the same output, to measure with."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_specformer.cli.arguments import magnitude, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, metavar="TARGET", help="directory of a small target")
    parser.add_argument("head", type=Path, metavar="HEAD", help="directory of its head")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets both anew")
    parser.add_argument(
        "--parameters",
        type=magnitude,
        default=magnitude("500M"),
        metavar="N",
        help="size of the new target, such as 100M or 1B (500M)",
    )
    parser.add_argument(
        "--layers", type=positive, default=16, metavar="N", help="of the new target (16)"
    )


def run(options: argparse.Namespace) -> int:
    """Make the pair, or find it made; exit code 0."""
    from vllm_specformer.bench.enlarge import enlarge

    pair = enlarge(
        options.target, options.head, options.out, options.parameters, layers=options.layers
    )
    print(f"{pair.target}: {pair.parameters:,} parameters, the same output as {options.target}")
    print(f"{pair.head}: {options.head} for it")
    return 0
