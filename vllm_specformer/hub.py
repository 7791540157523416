"""Models of the Hugging Face hub, or of its cache where there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from vllm_specformer.errors import SpecFormerError

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class HubError(SpecFormerError):
    """A model cannot be had; the message says why, its reader knows which model."""


def is_path(name: str) -> bool:
    """Whether a name can only be a path: a repository's is "name" or "owner/name"."""
    if "://" in name:  # storage that vLLM reads by itself
        return False
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def download(name: str, revision: str | None = None) -> Path:
    """Directory with the files of a repository, named by its commit.

    A model is downloaded whole, as engine and training need it anyway.

    Raises:
        HubError: it is a path, or no such repository, or the network is missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if is_path(name):
        raise HubError("no such directory", "check the path")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HubError(
            f"neither a directory nor a model that could be fetched ({reason})",
            "check the name, the network, HF_HUB_OFFLINE and, for gated models, HF_TOKEN",
        ) from None


def config_of(model: str, revision: str | None = None) -> Any:
    """Content of the `config.json` of a directory or a repository, None where it cannot be read.

    Raises nothing: Transformers takes any JSON for an object, and fails in many ways if it is none.
    """
    try:
        return PreTrainedConfig.get_config_dict(model, revision=revision)[0]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
