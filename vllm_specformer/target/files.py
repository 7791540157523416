"""Find a target's files and tell one target from another without loading it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_specformer.data.manifest import TargetRecord
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.hub import HubError, download
from vllm_specformer.places import lasting

_SAMPLE_BYTES = 1 << 20
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt")


class TargetError(SpecFormerError):
    """The target cannot be found or lacks files."""


def find_target(name_or_path: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Directory of a target and, when it came from the model hub, its commit.

    A model of the hub is downloaded whole, as the engine and the training need it anyway.

    Raises:
        TargetError: no such directory or model, or it has no config.json.
    """
    directory, commit = Path(name_or_path), None
    if not directory.is_dir():
        try:
            directory = download(name_or_path, revision)
        except HubError as error:
            raise TargetError(f"target {name_or_path}: {error}") from None
        commit = directory.name  # the hub's cache names a snapshot by its commit
    elif revision is not None:
        raise TargetError(
            f"revision {revision!r}: {name_or_path} is a directory and has no revisions",
            "leave it out",
        )
    if not (directory / "config.json").is_file():
        raise TargetError(
            f"target {name_or_path}: {directory / 'config.json'} is missing",
            "name a directory with a Hugging Face model, or a model of the hub",
        )
    return directory, commit


def target_record(name_or_path: str, directory: Path, commit: str | None) -> TargetRecord:
    """Describe the target whose files lie in `directory`."""
    config = read_json(directory / "config.json")
    text = config.get("text_config") or config
    try:
        return TargetRecord(
            name_or_path=lasting(name_or_path),
            revision=commit,
            architecture=config["architectures"][0],
            vocab_size=text["vocab_size"],
            fingerprint=fingerprint(directory),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise TargetError(
            f"target {directory / 'config.json'}: field {error} is missing",
            "this is not the configuration of a language model",
        ) from None


def fingerprint(directory: Path) -> str:
    """Hex digest that changes with a target's configuration, tokenizer or weights.

    It covers config.json, the tokenizer's files, the index of the weights, and of each weights file
    its name, size and the MiB at its beginning, middle and end. The beginning alone would not do:
    it holds the table of tensors and often the embedding, which many fine-tunings leave as it was.
    So it takes milliseconds, whatever the model's size.

    Raises:
        TargetError: there are no safetensors weights.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise TargetError(
            f"target {directory}: no *.safetensors file",
            "weights in other formats are not "
            "supported, save the model again with Transformers' save_pretrained",
        )
    digest = hashlib.sha256()
    for name in ("config.json", *_TOKENIZER_FILES, _INDEX):
        path = directory / name
        if path.is_file():
            _add(digest, name, path.stat().st_size, path.read_bytes())
    for path in weights:
        _add(digest, path.name, path.stat().st_size, _sample(path))
    return digest.hexdigest()


def _sample(path: Path) -> bytes:
    last = max(0, path.stat().st_size - _SAMPLE_BYTES)
    parts = []
    with path.open("rb") as file:
        for start in (0, last // 2, last):
            file.seek(start)
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)


def _add(digest: Any, name: str, size: int, content: bytes) -> None:
    digest.update(f"{name}\0{size}\0".encode())
    digest.update(content)


def end_token_ids(directory: Path) -> frozenset[int]:
    """Tokens that end an answer, as generation_config.json and config.json name them."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            value = read_json(directory / name).get("eos_token_id")
            ids.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(ids)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        TargetError: not readable as one.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TargetError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise TargetError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
