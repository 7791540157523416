"""`specformer train`: train a head on what its target has written (see docs/training.md)."""

from __future__ import annotations

import argparse
import types
from typing import Any, Literal, Union, get_args, get_origin

from vllm_specformer.cli.common import INTERRUPTED, say

# The first field of each group in the help.
_GROUPS = {
    "target": "what",
    "preset": "the head",
    "epochs": "how long, in what portions",
    "optimizer": "optimiser",
    "slot_weights": "objective",
    "eval_share": "evaluation, log, checkpoints",
    "seed": "machine",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of `TrainSettings`; values are checked there, all in one place."""
    from vllm_specformer.training.settings import TrainSettings, option

    group = parser.add_argument_group()
    for name, field in TrainSettings.model_fields.items():
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        shown = field.description or ""
        arguments: dict[str, Any] = {"dest": name, "required": field.is_required()}
        if bool in _kinds(field.annotation):
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            choices = _choices(field.annotation)
            arguments["metavar"] = "{" + ",".join(choices) + "}" if choices else name.upper()
        if not field.is_required() and field.default is not None:
            shown = f"{shown.rstrip('.')} (default: {field.default})."
        arguments["default"] = argparse.SUPPRESS
        group.add_argument(option(name), help=shown.replace("%", "%%"), **arguments)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _choices(annotation: Any) -> list[str]:
    return [
        str(value)
        for kind in _kinds(annotation)
        if get_origin(kind) is Literal
        for value in get_args(kind)
    ]


def run(options: argparse.Namespace) -> int:
    """Train, or continue; exit code 0 when the head is there, 130 after Ctrl-C."""
    from vllm_specformer.training.settings import TrainSettings
    from vllm_specformer.training.train import train

    known = {n: v for n, v in vars(options).items() if n in TrainSettings.model_fields}
    settings = TrainSettings.read(**known)
    try:
        train(settings)
    except KeyboardInterrupt:
        say(
            f"\ninterrupted; give the same command again, and it continues from the last "
            f"checkpoint in {settings.out}"
        )
        return INTERRUPTED
    return 0
