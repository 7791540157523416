"""Stage b: `benchmarks/kernels.py`, which checks every kernel and then times it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Options = dict[str, Any]
SCRIPT = Path(__file__).resolve().parents[1] / "kernels.py"


def run(options: Options) -> Options:
    """Its rows.

    Args:
        options: `arguments` for the script; `stem` of the files it writes.
    """
    stem = Path(options["stem"])
    stem.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(SCRIPT), *options["arguments"], "--out", str(stem)]
    return {"rows": report_of(arguments, stem.with_suffix(".json"))["rows"]}


def report_of(arguments: Sequence[str], report: Path, codes: Sequence[int] = (0,)) -> Options:
    """What a Python program writes.

    Raises:
        RuntimeError: it ended with another code than `codes`, or without a report.
    """
    code = subprocess.run([sys.executable, *arguments], stdout=sys.stderr, check=False).returncode
    if code not in codes or not report.is_file():
        raise RuntimeError(f"it ended with code {code}; its messages stand in the log")
    found: Options = json.loads(report.read_text())
    return found
