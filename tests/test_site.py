"""The site has every document in its menu, and is built without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.paths import ROOT

CONFIG = ROOT / "mkdocs.yml"


def entries(menu: Any) -> Iterator[str]:
    for entry in menu:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values():
                yield from [part] if isinstance(part, str) else entries(part)


def test_the_menu_has_every_document_once() -> None:
    found = list(entries(yaml.safe_load(CONFIG.read_text())["nav"]))
    assert len(found) == len(set(found))
    assert all((ROOT / name).is_file() for name in found)
    documents = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")}
    assert documents <= set(found)


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is missing; `make setup` installs it"
)
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    """Dead links, missing anchors and pages outside of the menu are warnings, which end a build."""
    # Not `--quiet`: warnings that are not logged are not counted either.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    front = (tmp_path / "index.html").read_text()
    for sheet in re.findall(r'<link rel="stylesheet" href="([^"]+)"', front):
        assert (tmp_path / sheet).is_file()
    assert "vllm-specformer" in front
    assert (tmp_path / "docs" / "figures" / "masks.png").is_file()
