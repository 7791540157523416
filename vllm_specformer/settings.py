"""Settings of a command: the base class, and the kinds of values that several commands take.

A command is described once, by the fields of a `CommandSettings`: type, constraint, default and
description. `cli/flags.py` makes its flags from them, so command line and library agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic.fields import FieldInfo

from vllm_specformer.errors import SpecFormerError

if TYPE_CHECKING:
    from typing import Self

Marker = TypeVar("Marker")


class SettingsError(SpecFormerError):
    """A setting is unusable; the message names it as it is written on the command line."""


@dataclass(frozen=True)
class Spelling:
    """How values of a type are written.

    Attributes:
        metavar: stands for the value in --help; without it the field's name does.
        wanted: what a value has to be, for the error; without it pydantic's own words are used.
        repeated: the flag may be given several times.
    """

    metavar: str | tuple[str, ...] = ""
    wanted: str = ""
    repeated: bool = False


@dataclass(frozen=True)
class Flag:
    """How one field is written, where its name and type do not tell.

    Attributes:
        name: the flag, if it is not the field's name.
        positional: the value stands alone, without a flag.
        negated: there is also a --no-... form; a field that may be None always has it.
        formerly: the flag's name in the last release, still taken with a warning.
    """

    name: str = ""
    positional: bool = False
    negated: bool = False
    formerly: str = ""


def markers(field: FieldInfo, kind: type[Marker]) -> Iterator[Marker]:
    """What `Annotated` says of a field and of its parts, the field itself first."""
    for item in (*field.metadata, *_annotated(field.annotation)):
        if isinstance(item, kind):
            yield item


def _annotated(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for part in get_args(annotation):
        yield from _annotated(part)


def flag_of(field: FieldInfo) -> Flag:
    return next(markers(field, Flag), Flag())


def spelling_of(field: FieldInfo) -> Spelling:
    return next(markers(field, Spelling), Spelling())


class CommandSettings(BaseModel):
    """What one command can be told. Subclasses add the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # The first field of each group in --help, and the group's title.
    GROUPS: ClassVar[dict[str, str]] = {}

    @classmethod
    def written(cls, name: str) -> str:
        """A field as it is written on the command line: --max-tokens, or HEAD."""
        flag = flag_of(cls.model_fields[name])
        if flag.positional:
            return name.upper()
        return flag.name or "--" + name.replace("_", "-")

    @classmethod
    def read(cls, **values: Any) -> Self:
        """Settings from the command line's values, text or ready objects.

        Raises:
            SettingsError: the first that is unusable.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(cls._message(error.errors()[0])) from None

    @classmethod
    def _message(cls, item: Any) -> str:
        message = item["msg"].removeprefix("Value error, ")
        if not item["loc"]:
            return str(message)
        name, found = str(item["loc"][0]), item["input"]
        if name not in cls.model_fields:
            return f"{name}: no such setting; choose from {', '.join(cls.model_fields)}"
        wanted, flag = spelling_of(cls.model_fields[name]).wanted, cls.written(name)
        if item["type"] == "missing":
            return f"{flag}: needed"
        if item["type"] == "value_error":  # one of ours, which shows the value
            return f"{flag}: {message}"
        if wanted:
            return f"{flag}: expected {wanted}, found {found!r}"
        return f"{flag} {found}: {message}"

    def check_alternatives(self, *names: str, required: bool = False) -> None:
        """For a validator: of these fields, at most one may be given.

        Raises:
            ValueError: several are, or none is although one is `required`.
        """
        given = [self.written(name) for name in names if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: not allowed with {given[0]}; leave one of them out")
        if required and not given:
            raise ValueError(f"one of {', '.join(map(self.written, names))} is needed")


def json_object(value: Any) -> Any:
    """For a validator: text as the JSON object it holds; anything else as it is.

    Raises:
        ValueError: the text is no JSON object.
    """
    if isinstance(value, str):
        text = value
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not valid JSON ({error}): {text!r}") from None
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {text!r}")
    return value


def refuse_own(engine_args: Mapping[str, Any], own: Collection[str], owner: str) -> None:
    """For a validator: of vLLM's arguments, those in `own` are set by `owner` itself.

    Raises:
        ValueError: one of them is given.
    """
    for name in engine_args:
        if name.replace("-", "_") in own:
            raise ValueError(f"--engine-args: {name!r} is set by {owner}; leave it out")


def _writable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such directory as {path.parent}; create it")
    if path.is_dir():
        raise ValueError(f"{path}: a directory; name a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: {path.parent} cannot be written to; choose another")
    return path


_ABOVE_0 = "a whole number above 0"

Whole = Annotated[int, Spelling("N", "a whole number")]
Count = Annotated[int, Field(ge=0), Spelling("N", "a whole number, 0 or more")]
Positive = Annotated[int, Field(ge=1), Spelling("N", _ABOVE_0)]
Drafts = Annotated[int, Field(ge=1), Spelling("K", _ABOVE_0)]
Nodes = Annotated[int, Field(ge=1, le=63), Spelling("N", "a whole number from 1 to 63")]
Share = Annotated[float, Field(ge=0, le=1), Spelling("SHARE", "a number from 0 to 1")]
Temperature = Annotated[float, Field(ge=0, le=2), Spelling("T", "a number from 0 to 2")]
TopP = Annotated[float, Field(ge=1e-6, le=1), Spelling("P", "a number above 0, at most 1")]
Seconds = Annotated[float, Field(ge=0), Spelling("S", "a number of seconds, 0 or more")]
File = Annotated[Path, Spelling("FILE")]
Directory = Annotated[Path, Spelling("DIR")]
# Found unwritable before the work, not behind it.
ResultFile = Annotated[Path, AfterValidator(_writable), Spelling("FILE")]
JsonObject = Annotated[dict[str, Any], BeforeValidator(json_object), Spelling("JSON")]
# A command about a head and its target takes all three.
Head = Annotated[Path, Flag(positional=True), Field(description="Directory of the head.")]
TargetOfHead = Annotated[
    str | None,
    Field(description="Directory or hub name of the target; default: the one the head names."),
]
Revision = Annotated[str | None, Field(description="Branch, tag or commit of a target on the hub.")]
