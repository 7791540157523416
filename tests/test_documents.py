"""Links of the documents lead somewhere, and their commands are ones that exist."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from support.cli_reference import parser_of
from support.paths import ROOT
from vllm_specformer.cli.main import SERVE
from vllm_specformer.engine.patches.ledger import declared
from vllm_specformer.engine.speculative_config import (
    ADAPTIVE,
    CONFIDENCE,
    SCHEDULE,
    TREE,
    TREE_SCHEDULE,
)

DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "kernels" / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("kernels/specformer_kernels/*/README.md"),
        *ROOT.glob("examples/**/README.md"),
    ]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
MAKE = re.compile(r"\bmake ([a-z][a-z-]*)")
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
SCRIPT = re.compile(r"\bpython ((?:benchmarks|examples|tests)/\S+\.py)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = HEADING.findall(prose(path.read_text()))
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def commands(text: str) -> list[str]:
    """Lines of the shell blocks, continued ones joined."""
    blocks = [body for language, body in FENCE.findall(text) if language == "bash"]
    joined = [re.sub(r"\\\n\s*", " ", body) for body in blocks]
    return [line for body in joined for line in split_lines(body)]


def split_lines(body: str) -> list[str]:
    """Lines of a block; a quoted text may go over several."""
    lines: list[str] = []
    for line in body.splitlines():
        if lines and not is_closed(lines[-1]):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.strip())
    return lines


def is_closed(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False
    return True


def words_of(line: str) -> list[str]:
    """The words of a `specformer` command, without what stands around it."""
    words = shlex.split(line, comments=True)
    for index, word in enumerate(words):
        if Path(word).name == "specformer" or word == "vllm_specformer.cli.main":
            rest = words[index + 1 :]
            ends = [i for i, word in enumerate(rest) if word in ("&&", "|", "||", ";", ">", "&")]
            return rest[: min(ends, default=len(rest))]
    return []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(prose(path.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{name_of(path)}: {link}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{name_of(path)}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each `specformer` command takes its options; `make` targets and scripts are there."""
    text = path.read_text()
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    assert (
        set(MAKE.findall(" ".join([*commands(text), *re.findall(r"`([^`]*)`", text)]))) <= targets
    )
    for script in SCRIPT.findall(text):
        assert (ROOT / script).is_file(), f"{name_of(path)}: {script}"
    for line in commands(text):
        command, *options = words_of(line) or [SERVE]
        if command == SERVE:
            continue
        try:
            parser_of(command).parse_args(options)
        except SystemExit:
            pytest.fail(f"{name_of(path)}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_configurations_are_json(path: Path) -> None:
    for line in commands(path.read_text()):
        words = shlex.split(line, comments=True)
        for option, value in pairwise(words):
            if option in ("--speculative-config", "--engine-args"):
                json.loads(value.partition("=")[2] if re.match(r"\w+=", value) else value)


def test_the_proposal_counts_our_changes() -> None:
    text = (ROOT / "docs" / "upstream.md").read_text()
    assert f"needs {len(list(declared()))} changes of vLLM" in text


def test_every_field_of_ours_has_a_row() -> None:
    rows = (ROOT / "docs" / "speculative-config.md").read_text()
    for field in ("verification", SCHEDULE, CONFIDENCE, TREE, TREE_SCHEDULE, ADAPTIVE):
        assert f"| `{field}` |" in rows


def test_a_wrong_document_is_found(tmp_path: Path) -> None:
    """What reads the documents sees links, commands and continued lines."""
    text = (
        "[a](b.md#c)\n\n```bash\nX=1 specformer train \\\n    --data '{\n  1}'  # it's\nls\n```\n"
    )
    assert LINK.findall(prose(text)) == ["b.md#c"]
    assert commands(text)[1:] == ["ls"]
    assert words_of(commands(text)[0]) == ["train", "--data", "{ 1}"]
    assert anchors_of("## Is it: *good*?\n", tmp_path) == {"is-it-good"}


def anchors_of(text: str, folder: Path) -> set[str]:
    (folder / "a.md").write_text(text)
    return anchors(folder / "a.md")
