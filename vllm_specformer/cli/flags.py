"""From a command's settings to its flags, and from what was typed to the settings."""

from __future__ import annotations

import argparse
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from vllm_specformer.cli.common import say
from vllm_specformer.settings import CommandSettings, flag_of, markers, spelling_of

Settings = TypeVar("Settings", bound=CommandSettings)
_FORMER = "former_"  # before a field's name: what its former flag was given


def add_flags(parser: argparse.ArgumentParser, settings: type[CommandSettings]) -> None:
    """One flag per field. Values stay text here: the settings check them, all in one place."""
    group: Any = parser
    for name, field in settings.model_fields.items():
        if name in settings.GROUPS:
            group = parser.add_argument_group(settings.GROUPS[name])
        flag, arguments = flag_of(field), _arguments(name, field)
        shown = _help(field).replace("%", "%%")
        if flag.positional:
            nargs = None if field.is_required() else "?"
            group.add_argument(name, help=shown, nargs=nargs, **arguments)
            continue
        required = field.is_required()
        group.add_argument(
            settings.written(name), dest=name, required=required, help=shown, **arguments
        )
        if flag.formerly:
            group.add_argument(
                flag.formerly, dest=_FORMER + name, help=argparse.SUPPRESS, **arguments
            )


def read(settings: type[Settings], options: argparse.Namespace) -> Settings:
    """The settings of a parsed command line; warns of flags with a new name.

    Raises:
        SettingsError: a value is unusable.
    """
    values = {}
    for name, field in settings.model_fields.items():
        if hasattr(options, _FORMER + name):
            old, new = flag_of(field).formerly, settings.written(name)
            say(f"warning: {old} is called {new} now; the next release will not know {old}")
            values[name] = getattr(options, _FORMER + name)
        if hasattr(options, name):
            values[name] = getattr(options, name)
    return settings.read(**values)


def _arguments(name: str, field: FieldInfo) -> dict[str, Any]:
    """What `add_argument` is told of a field's values. The settings know the defaults."""
    kind = _kind(field.annotation)
    if kind is bool:
        either = flag_of(field).negated or field.default is None
        action = argparse.BooleanOptionalAction if either else "store_true"
        return {"action": action, "default": argparse.SUPPRESS}
    spelling = spelling_of(field)
    choices = f"{{{','.join(map(str, get_args(kind)))}}}" if get_origin(kind) is Literal else ""
    arguments: dict[str, Any] = {
        "metavar": spelling.metavar or choices or name.upper(),
        "default": argparse.SUPPRESS,
    }
    if spelling.repeated:
        arguments["action"] = "append"
    # What a validator reads from one text is one text, whatever it becomes.
    elif get_origin(kind) is tuple and not any(markers(field, BeforeValidator)):
        parts = get_args(kind)
        several = parts[-1] is Ellipsis
        arguments |= {"nargs": "+" if several else len(parts)}
        if several:  # `--data a b` and `--data a --data b` are the same
            arguments["action"] = "extend"
    return arguments


def _kind(annotation: Any) -> Any:
    """The type itself, without None and what `Annotated` adds."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return next(_kind(part) for part in get_args(annotation) if part is not type(None))
    return annotation


def _help(field: FieldInfo) -> str:
    """The description, with the default if there is one to tell."""
    shown = field.description or ""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if default is None or default is False or default in ((), {}, ""):
        return shown
    return f"{shown.rstrip('.')} (default: {default_text(default)})."


def default_text(default: Any) -> str:
    """A default as it could be typed."""
    if isinstance(default, tuple):
        return " ".join(map(default_text, default))
    return f"{default:g}" if isinstance(default, float) else str(default)
