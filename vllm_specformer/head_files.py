"""Where a head's files lie: a directory, or a repository of the model hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import write_atomic
from vllm_specformer.head_fields import HeadConfigError
from vllm_specformer.hub import HubError, config_of, download
from vllm_specformer.names import describes_head


def find_head(name: Path | str) -> Path:
    """Directory of a head; one of the hub is fetched, or found in the hub's cache.

    Raises:
        HeadConfigError: neither a path that exists nor a repository that can be had.
    """
    try:
        if Path(name).exists():
            return Path(name)
        return download(str(name))
    except (HubError, OSError) as error:  # OSError: too long a name for a file
        raise HeadConfigError(
            f"SpecFormer head {name}: {error}",
            "name the directory or the repository of a trained head",
        ) from None


def names_head(model: str, revision: str | None = None) -> bool:
    """Whether a directory or a repository holds a SpecFormer head.

    It reads what vLLM itself reads of a draft model first, its `config.json`. A name that cannot be
    read is no head; a name without "/" is no repository that anyone could have put a head into, and
    is not asked for: vLLM takes class names and the like in the same field.
    """
    try:
        if "/" not in model and not Path(model).is_dir():
            return False
    except OSError:  # too long a name for a file
        return False
    return describes_head(config_of(model, revision))


def files_at_hand(model: str, revision: str | None = None) -> Path | None:
    """The directory that holds a head's `config.json` already: its own, or one in the hub's cache.

    The weights of a repository may be missing in it: vLLM fetches them later.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    found: Any = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def write_fields(head: Path, fields: Mapping[str, Sequence[float]]) -> None:
    """Put lists of numbers into a head's config.json; its weights are left alone.

    Raises:
        DiskFullError: the file cannot be written; it is what it was.
    """
    path = head / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {name: list(values) for name, values in fields.items()}
    write_atomic(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
