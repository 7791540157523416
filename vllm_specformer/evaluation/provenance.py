"""What a head's directory says about its training: `provenance.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_specformer.errors import SpecFormerError

PROVENANCE_FILE = "provenance.json"
_SECTIONS = ("target", "data", "settings", "versions", "result")


def read_provenance(head: Path) -> dict[str, Any] | None:
    """The record that `specformer train` left, None where there is none.

    Raises:
        SpecFormerError: it is not readable, or not that record.
    """
    path = head / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SpecFormerError(
            f"{path}: not readable as JSON ({error})", "copy the head again"
        ) from None
    missing = [name for name in _SECTIONS if name not in (content or {})]
    if missing:
        raise SpecFormerError(
            f"{path}: section {missing[0]!r} is missing", "copy the head again, or remove the file"
        )
    return dict(content)
