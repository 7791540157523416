"""Wheel and sdist: built, installed into a clean environment with vLLM, used and uninstalled.

The environment sees this one's packages but not this package: `make test-install`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import HEAD, ROOT, TARGET

pytestmark = pytest.mark.install

PACKAGES = ("vllm_specformer", "specformer_kernels")
PLUGIN = (
    "from importlib.metadata import entry_points\n"
    "print([e.name for e in entry_points(group='vllm.general_plugins')])"
)
Run = Callable[..., str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks, so that neither build leaves anything in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    archive = folder.with_suffix(".tar")
    subprocess.run(["git", "archive", "-o", str(archive), "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of a clean environment, outside of the checkout; returns what it prints."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    others = folder / "others"
    others.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "specformer" not in path.name:
            (others / path.name).symlink_to(path)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{others}\n")

    def run(*command: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        program = str(folder / "bin" / command[0])
        done = subprocess.run(
            [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_what_the_wheel_holds(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops - set(PACKAGES) == {top for top in tops if top.endswith(".dist-info")}
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert "vllm_specformer/families.json" in names
    tracked = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    ours = {name.removeprefix("kernels/") for name in tracked if name.endswith(".py")}
    expected = {name for name in ours if name.startswith(tuple(f"{p}/" for p in PACKAGES))}
    assert {name for name in names if name.endswith(".py")} == expected


def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(sdist)], check=True)
    (again,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_installed_used_and_uninstalled(run: Run, wheel: Path) -> None:
    assert "specformer" not in run("python", "-c", PLUGIN)
    pip = ("python", "-m", "pip")
    run(*pip, "install", "--no-deps", "--no-index", str(wheel))
    assert "'specformer'" in run("python", "-c", PLUGIN)
    where = run("python", "-c", "import vllm_specformer as v; print(v.__file__)")
    assert str(ROOT) not in where
    findings = json.loads(run("specformer", "doctor", "--json"))
    assert findings
    run("specformer", "check", str(HEAD), "--target", str(TARGET))
    run(*pip, "uninstall", "-y", "vllm-specformer")
    assert "specformer" not in run("python", "-c", PLUGIN)
