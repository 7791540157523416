"""The texts that every arm gets, as vLLM's benchmark client reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from vllm_specformer.data.files import write_atomic


def digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()


def write_data_set(prompts: Sequence[str], path: Path) -> None:
    """The prompts as the client's `sharegpt` data set, which it reads without pandas.

    Lengths come from an option, so the answers, which it wants to see, are not used.
    """
    entries = [{"conversations": [{"value": text}, {"value": "-"}]} for text in prompts]
    write_atomic(path, json.dumps(entries).encode())
