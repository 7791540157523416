"""From settings to flags: what holds for every command, and what made-up settings show."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import pytest
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from vllm_specformer.cli.flags import add_flags, read
from vllm_specformer.cli.main import COMMANDS, SERVE, main
from vllm_specformer.settings import (
    CommandSettings,
    Flag,
    Positive,
    SettingsError,
    Share,
    Spelling,
    spelling_of,
)

OWN = [name for name in COMMANDS if name != SERVE]
FIELDS = [
    (command, name, field)
    for command in OWN
    for name, field in import_module(COMMANDS[command][0]).SETTINGS.model_fields.items()
]


def parsed(settings: type[CommandSettings], arguments: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, settings)
    return read(settings, parser.parse_args(arguments))


# --- every command ---


@pytest.fixture(scope="module")
def helps() -> dict[str, list[str]]:
    """The lines of each command's --help, one per flag."""
    found = {}
    for command in OWN:
        parser = argparse.ArgumentParser(
            formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 1000, 10_000)
        )
        add_flags(parser, import_module(COMMANDS[command][0]).SETTINGS)
        found[command] = parser.format_help().splitlines()
    return found


def least(settings: type[CommandSettings]) -> list[str]:
    """The shortest arguments that the command takes."""
    needed = [name for name, field in settings.model_fields.items() if field.is_required()]
    if settings.__name__ == "EvalSettings":
        needed.append("data")
    if settings.__name__ == "TrainSettings":
        needed += ["target", "data", "out"]
    written = [settings.written(name) for name in needed]
    return [part for flag in written for part in ([flag, "x"] if flag[0] == "-" else ["x"])]


@pytest.mark.parametrize(
    ("command", "name", "field"), FIELDS, ids=[f"{command} {name}" for command, name, _ in FIELDS]
)
def test_every_setting_is_described_with_its_default(
    helps: dict[str, list[str]], command: str, name: str, field: FieldInfo
) -> None:
    settings = import_module(COMMANDS[command][0]).SETTINGS
    written = settings.written(name)
    (line,) = [line for line in helps[command] if re.match(rf"  {written}([ ,]|$)", line)]
    assert field.description
    shown = re.search(r" \(default: (.*)\)\.$", line)
    if shown is None:
        assert line.endswith(f"  {field.description}")
        assert field.is_required() or field.default in (None, False, (), {}, "")
    else:
        assert line.endswith(f"  {field.description.rstrip('.')}{shown[0]}")
        # Typing what is shown changes nothing.
        typed = parsed(settings, [*least(settings), written, *shown[1].split()])
        assert typed == parsed(settings, least(settings))


@pytest.mark.parametrize(("command", "name", "field"), FIELDS)
def test_what_takes_words_or_numbers_says_so(command: str, name: str, field: FieldInfo) -> None:
    """From its type alone --help would show the words, as if nothing else were allowed."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    literal = any(get_origin(kind) is Literal for kind in kinds)
    assert len(kinds) < 2 or not literal or spelling_of(field).metavar


@pytest.mark.parametrize("command", OWN)
def test_help_is_printed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = import_module(COMMANDS[command][0]).SETTINGS
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name in settings.model_fields:
        assert settings.written(name) in printed
    for title in settings.GROUPS.values():
        assert f"\n{title}:\n" in printed
    assert set(settings.GROUPS) <= set(settings.model_fields)


# --- made-up settings ---


class MadeUp(CommandSettings):
    GROUPS: ClassVar[dict[str, str]] = {"size": "sizes"}

    place: Annotated[str, Flag(positional=True)] = Field(description="A place.")
    size: Annotated[Positive, Flag(formerly="--length")] = Field(3, description="100% of it.")
    shares: Annotated[tuple[Share, ...], Flag(formerly="--parts")] = Field(
        (0.5, 1.0), description="Shares."
    )
    loud: Annotated[bool, Flag(formerly="--noisy")] = Field(False, description="Loudly.")
    either: bool | None = Field(None, description="Decided by itself.")
    kind: Literal["a", "b"] = Field("a", description="Kind.")
    some: Annotated[Literal["all"] | Positive | None, Spelling("N|all", "a number or 'all'")] = (
        Field(None, description="Some.")
    )
    pair: tuple[int, int] | None = Field(None, description="Two.")
    as_text: Annotated[str, Flag(name="--text")] | None = Field(None, description="Text.")
    named: Annotated[tuple[str, ...], Spelling("NAME", repeated=True)] = Field(
        (), description="Names."
    )


def test_what_is_not_typed_is_left_to_the_settings() -> None:
    settings = parsed(MadeUp, ["here"])
    assert settings == MadeUp(place="here")
    assert settings.model_fields_set == {"place"}


def test_flags_of_each_kind() -> None:
    given = parsed(
        MadeUp,
        [
            *("here", "--size", "5", "--shares", "0.1", "0.2", "--loud", "--no-either"),
            *("--kind", "b", "--pair", "1", "2", "--text", "t", "--named", "x", "--named", "y"),
        ],
    )
    assert given == MadeUp(
        place="here",
        size=5,
        shares=(0.1, 0.2),
        loud=True,
        either=False,
        kind="b",
        pair=(1, 2),
        as_text="t",
        named=("x", "y"),
    )
    assert parsed(MadeUp, ["here", "--either"]).either is True


def test_usage_names_what_may_be_typed() -> None:
    parser = argparse.ArgumentParser(prog="x")
    add_flags(parser, MadeUp)
    usage = " ".join(parser.format_usage().split())
    assert usage == (
        "usage: x [-h] [--size N] [--shares SHARE [SHARE ...]] [--loud] [--either | --no-either] "
        "[--kind {a,b}] [--some N|all] [--pair PAIR PAIR] [--text AS_TEXT] [--named NAME] PLACE"
    )
    assert "100% of it (default: 3)." in parser.format_help()


@pytest.mark.parametrize(
    ("arguments", "changes", "old", "new"),
    [
        (("--length", "7"), {"size": 7}, "--length", "--size"),
        (("--parts", "0", "1"), {"shares": (0.0, 1.0)}, "--parts", "--shares"),
        (("--noisy",), {"loud": True}, "--noisy", "--loud"),
    ],
)
def test_a_former_name_still_works_and_warns_once(
    arguments: tuple[str, ...],
    changes: dict[str, Any],
    old: str,
    new: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parsed(MadeUp, ["here", *arguments]) == MadeUp(place="here", **changes)
    shown = capsys.readouterr()
    assert shown.err == (
        f"warning: {old} is called {new} now; the next release will not know {old}\n"
    )
    assert shown.out == ""


def test_former_names_are_not_advertised_and_the_new_one_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, MadeUp)
    for old in ("--length", "--parts", "--noisy"):
        assert old not in parser.format_help()
    assert parsed(MadeUp, ["here", "--size", "4", "--length", "5"]).size == 4
    assert capsys.readouterr().err.count("\n") == 1
    assert parsed(MadeUp, ["here", "--size", "4"]).size == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "0"), "--size: expected a whole number above 0, found '0'"),
        (("--length", "0"), "--size: expected a whole number above 0, found '0'"),
        (("--shares", "1", "2"), "--shares: expected a number from 0 to 1, found '2'"),
        (("--kind", "c"), "--kind c: Input should be 'a' or 'b'"),
        (("--some", "none"), "--some: expected a number or 'all', found 'none'"),
    ],
)
def test_one_line_names_flag_value_and_remedy(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        parsed(MadeUp, ["here", *arguments])
    assert str(error.value) == message


def test_the_library_is_told_the_same() -> None:
    with pytest.raises(SettingsError, match=r"^PLACE: needed$"):
        MadeUp.read()
    with pytest.raises(SettingsError, match=r"^sise: no such setting; choose from place, size"):
        MadeUp.read(place="here", sise=3)
    with pytest.raises(ValidationError):
        MadeUp(place="here", size=0)
