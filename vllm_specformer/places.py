"""Names of files and models that mean the same wherever the file that holds them is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head_fields import HeadConfigError
from vllm_specformer.hub import config_of

# "name" or "owner/name"; a name cannot begin with a dot, so "../target" is none.
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FIELD = "speculators_config.verifier.name_or_path"


def lasting(name: Path | str) -> str:
    """A path that exists as an absolute one; any other name, such as a repository's, as it is."""
    try:
        path = Path(name).expanduser()
        if not path.exists():
            return str(name)
    except (OSError, RuntimeError):  # too long for a file system, or a home that is unknown
        return str(name)
    # Links keep their names, which may outlive what they lead to; but "link/.." needs the file
    # system to be understood.
    return str(path.resolve() if ".." in path.parts else path.absolute())


def lasting_model(speculative: dict[str, Any] | None) -> dict[str, Any] | None:
    """A speculative config with its `model` made lasting, if it names one."""
    if not speculative or not isinstance(speculative.get("model"), str):
        return speculative
    return speculative | {"model": lasting(speculative["model"])}


def check_target_name(name: str, head: Path) -> None:
    """Refuse a name that will not lead from a head's file to its target.

    Args:
        head: directory that the head will lie in.

    Raises:
        HeadConfigError: a path from the working directory on.
    """
    path = Path(name)
    if path.is_absolute() or name.startswith(".") or "://" in name or (head / name).is_dir():
        return
    if path.exists() or not _REPOSITORY.fullmatch(name):
        raise HeadConfigError(
            f"--target-name {name}: a head's file names its target by an absolute path, by a path "
            "from the file on as in '../target', or by a name of the hub",
            "write one of these",
        )


def named_target(head: Path, config: SpecFormerConfig, revision: str | None = None) -> str:
    """The target that a head's `config.json` names: an absolute path, or a name of the hub.

    A path in that file is absolute or relative to the file. What it means never depends on the
    directory a command is given in.

    Args:
        head: directory of the head.
        revision: of the target, if it is one of the hub.

    Raises:
        HeadConfigError: there is neither such a directory nor such a repository.
    """
    name = config.target_name_or_path
    try:
        if (head / name).is_dir():
            return str((head / name).resolve())
        elsewhere = Path(name).exists()  # beside the user, not beside the file
    except OSError:  # too long a name for a file
        elsewhere = True
    if "://" in name:  # storage that vLLM reads by itself
        return name
    known = _REPOSITORY.fullmatch(name) and not elsewhere
    if not known or config_of(name, revision) is None:
        raise HeadConfigError(
            f"SpecFormer head config {head / 'config.json'}: field {_FIELD!r} is {name!r}, neither "
            "a directory (seen from this file) nor a repository that can be read",
            "write the "
            "target's absolute path there, or its path from this file on as in '../target', or "
            "name the target yourself (--target, or vllm serve TARGET --speculative-config ...)",
        )
    return name
