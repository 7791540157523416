"""Lays the site out as the repository is: a hook of mkdocs (mkdocs.yml).

Documents link each other, figures and results by their places in the repository, which is how a
forge shows them. So every file keeps that path as its source, README.md is the front page, and
what the pages link to outside of docs/ comes along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # the anchors that GitHub makes
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's own files stay; those of docs/ come again, under their place in here."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *(file_of(path, config) for path in sorted(reachable()))])


def reachable() -> set[Path]:
    """The documents, what they link to, and the style sheet."""
    found: set[Path] = set()
    waiting = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.css")]
    while waiting:
        path = waiting.pop()
        if path not in found and path.suffix == ".md":
            waiting += linked(path)
        found.add(path)
    return found


def linked(path: Path) -> Iterator[Path]:
    for link in LINK.findall(FENCE.sub("", path.read_text())):
        if not re.match(r"[a-z]+:|#", link):
            target = (path.parent / link.partition("#")[0]).resolve()
            if target.is_file() and target.is_relative_to(ROOT):
                yield target


def file_of(path: Path, config: MkDocsConfig) -> File:
    return File(
        path.relative_to(ROOT).as_posix(),
        src_dir=str(ROOT),
        dest_dir=config.site_dir,
        use_directory_urls=config.use_directory_urls,
    )
