"""Links of the documents lead somewhere, and their commands are ones that exist."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from support.cli_reference import parser_of
from support.document_commands import FENCE, shell_lines
from support.paths import ROOT
from vllm_specformer import __version__
from vllm_specformer.cli.main import SERVE
from vllm_specformer.engine.patches.ledger import declared
from vllm_specformer.engine.speculative_config import (
    ADAPTIVE,
    CONFIDENCE,
    SCHEDULE,
    TREE,
    TREE_SCHEDULE,
    as_dictionary,
    check_fields,
    split_own_fields,
)
from vllm_specformer.errors import SpeculativeConfigError

# Pages that a test or a command writes, or that are tables of another release's lines.
WRITTEN = {"cli", "compatibility", "families", "gpu-predictions", "head-format", "kernel-api"}
MOST_LINES = 120
HIDDEN = re.compile(r"<!--.*?-->\n*", re.DOTALL)
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
ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ")
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
        set(MAKE.findall(" ".join([*shell_lines(text), *re.findall(r"`([^`]*)`", text)])))
        <= targets
    )
    for script in SCRIPT.findall(text):
        assert (ROOT / script).is_file(), f"{name_of(path)}: {script}"
    for line in shell_lines(text):
        command, *options = words_of(line) or [SERVE]
        if command == SERVE:
            continue
        try:
            parser_of(command).parse_args(options)
        except SystemExit:
            pytest.fail(f"{name_of(path)}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_configurations_are_json(path: Path) -> None:
    for line in shell_lines(path.read_text()):
        words = shlex.split(line, comments=True)
        for option, value in pairwise(words):
            if option in ("--speculative-config", "--engine-args"):
                json.loads(value.partition("=")[2] if re.match(r"\w+=", value) else value)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_configurations_are_ones_that_we_take(path: Path) -> None:
    for line in shell_lines(path.read_text()):
        words = shlex.split(line, comments=True)
        for option, value in pairwise(words):
            if option == "--speculative-config" and "..." not in value:
                fields = as_dictionary(json.loads(value))
                check_fields(fields)
                split_own_fields(fields)


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=name_of)
def test_guides_are_of_a_length_to_read(path: Path) -> None:
    """Without what only a reader of the source sees."""
    lines = HIDDEN.sub("", path.read_text()).splitlines()
    assert len(lines) <= MOST_LINES or path.stem in WRITTEN


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_lists_stand_apart(path: Path) -> None:
    """The site shows a list only where an empty line is before it."""
    lines = ["", *prose(HIDDEN.sub("", path.read_text())).splitlines()]
    for before, line in pairwise(lines):
        if ITEM.match(line) and not line.startswith(" "):
            assert not before or before.startswith((" ", "#")) or ITEM.match(before), line


def test_the_version_is_the_changelog_s() -> None:
    project = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    (first, *_) = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project == [__version__] == [first]


def test_the_proposal_counts_our_changes() -> None:
    text = (ROOT / "docs" / "upstream.md").read_text()
    assert f"needs {len(list(declared()))} changes of vLLM" in text


def test_every_field_of_ours_has_a_row() -> None:
    rows = (ROOT / "docs" / "speculative-config.md").read_text()
    for field in ("verification", SCHEDULE, CONFIDENCE, TREE, TREE_SCHEDULE, ADAPTIVE):
        assert f"| `{field}` |" in rows


# A value of each field that asks for something.
ASKING = {
    TREE: 16,
    CONFIDENCE: 0.2,
    ADAPTIVE: True,
    "verification": "coupled",
    SCHEDULE: [[1, 8, 4], [9, 64, 0]],
}
COLUMNS = {
    "threshold": CONFIDENCE,
    "adaptive": ADAPTIVE,
    "schedule": SCHEDULE,
    "coupled": "verification",
    "tree": TREE,
}


def test_what_goes_together_is_what_the_table_says() -> None:
    text = (ROOT / "docs" / "speculative-config.md").read_text()
    table = text.partition("## Which go together")[2].strip().splitlines()
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) == len(ASKING)
    for name, *cells in rows:
        one = name.strip("`").partition(":")[0]
        for head, cell in zip(heads[1:], cells, strict=True):
            other = COLUMNS[head]
            if one != other:
                assert goes(one, other) == (cell in ("yes", "always")), f"{one} with {head}"


def goes(*names: str) -> bool:
    try:
        split_own_fields({name: ASKING[name] for name in names})
    except SpeculativeConfigError:
        return False
    return True


def test_a_wrong_document_is_found(tmp_path: Path) -> None:
    """What reads the documents sees links, commands and continued lines."""
    text = (
        "[a](b.md#c)\n\n```bash\nX=1 specformer train \\\n    --data '{\n  1}'  # it's\nls\n```\n"
    )
    assert LINK.findall(prose(text)) == ["b.md#c"]
    assert shell_lines(text)[1:] == ["ls"]
    assert words_of(shell_lines(text)[0]) == ["train", "--data", "{ 1}"]
    assert anchors_of("## Is it: *good*?\n", tmp_path) == {"is-it-good"}


def anchors_of(text: str, folder: Path) -> set[str]:
    (folder / "a.md").write_text(text)
    return anchors(folder / "a.md")
