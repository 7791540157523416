"""`specformer check`: does this head fit that target? (see docs/training.md)"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_specformer.cli.arguments import positive

if TYPE_CHECKING:
    from vllm_specformer.evaluation.fit import Finding

_WIDTH = 110
_COLOURS = {"ok": "green", "warning": "yellow", "misfit": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("head", type=Path, metavar="HEAD", help="directory of the head")
    parser.add_argument("--target", help="directory or hub name; default: the one the head names")
    parser.add_argument("--revision", help="branch, tag or commit of a model of the hub")
    parser.add_argument(
        "--num-speculative-tokens", type=positive, metavar="K", help="as it is to be served"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the findings; exit code 0 if the head fits, 1 if it does not."""
    from vllm_specformer.evaluation.fit import MISFIT, examine

    findings = examine(
        options.head, options.target, options.revision, options.num_speculative_tokens
    )
    fits = all(finding.status != MISFIT for finding in findings)
    if options.json:
        listed = [asdict(finding) for finding in findings]
        print(json.dumps({"fits": fits, "findings": listed}, indent=2))
    else:
        _print(findings, fits)
    return 0 if fits else 1


def _print(findings: list[Finding], fits: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("what", "", "found", "remedy"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=_COLOURS[finding.status])
        table.add_row(finding.subject, status, Text(finding.found), Text(finding.remedy))
    console = Console(width=_WIDTH, highlight=False)
    console.print(table)
    console.print("the head fits" if fits else "the head does NOT fit")
