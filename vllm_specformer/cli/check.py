"""`specformer check`: does this head fit that target? (see docs/evaluate.md)"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vllm_specformer.settings import (
    CommandSettings,
    Drafts,
    Flag,
    Head,
    Revision,
    TargetOfHead,
)

if TYPE_CHECKING:
    from vllm_specformer.evaluation.fit import Finding

_WIDTH = 110
_COLOURS = {"ok": "green", "warning": "yellow", "misfit": "red"}


class CheckSettings(CommandSettings):
    """One check of a pair."""

    head: Head
    target: TargetOfHead = None
    revision: Revision = None
    num_speculative_tokens: Drafts | None = Field(
        None, description="Drafted tokens per step, as the head is to be served."
    )
    as_json: Annotated[bool, Flag(name="--json")] = Field(
        False, description="Print the findings as JSON."
    )


SETTINGS = CheckSettings


def run(settings: CheckSettings) -> int:
    """Print the findings; exit code 0 if the head fits, 1 if it does not."""
    from vllm_specformer.evaluation.fit import MISFIT, examine

    findings = examine(
        settings.head, settings.target, settings.revision, settings.num_speculative_tokens
    )
    fits = all(finding.status != MISFIT for finding in findings)
    if settings.as_json:
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
