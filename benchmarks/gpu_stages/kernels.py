"""Stage b: `benchmarks/kernels.py`, which checks every kernel and then times it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Options = dict[str, Any]
SCRIPT = Path(__file__).resolve().parents[1] / "kernels.py"


def run(options: Options) -> Options:
    """Its rows.

    Args:
        options: `arguments` for the script; `stem` of the files it writes.

    Raises:
        RuntimeError: a check failed, or it ended without results.
    """
    stem = Path(options["stem"])
    stem.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPT), *options["arguments"], "--out", str(stem)]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    report = stem.with_suffix(".json")
    if code or not report.is_file():
        raise RuntimeError(f"{SCRIPT.name} ended with code {code}; its messages stand in the log")
    return {"rows": json.loads(report.read_text())["rows"]}
