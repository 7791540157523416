"""Writes docs/cli.md, the options of every command, from their settings.

cd tests && python -m support.cli_reference
"""

from __future__ import annotations

import argparse
from importlib import import_module

from support.paths import ROOT
from vllm_specformer.cli.flags import add_flags
from vllm_specformer.cli.main import COMMANDS, SERVE
from vllm_specformer.data.files import write_atomic

PAGE = ROOT / "docs" / "cli.md"
HEAD = """# The command `specformer`

Generated from the commands' settings by `tests/support/cli_reference.py`; do not edit.
`specformer COMMAND --help` prints the same.
"""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command, `serve` excepted: its options are those of vLLM."""
    parser = argparse.ArgumentParser(prog=f"specformer {command}")
    add_flags(parser, import_module(COMMANDS[command][0]).SETTINGS)
    return parser


def page() -> str:
    parts = [HEAD]
    for command, (_, summary) in COMMANDS.items():
        parts.append(f"## {command}\n{summary[0].upper()}{summary[1:]}.\n")
        if command == SERVE:
            parts.append("Takes the options of `vllm serve`.\n")
            continue
        for group in parser_of(command)._action_groups:
            rows = [row(action) for action in group._group_actions if shown(action)]
            if rows:
                title = group.title or ""
                plain = title in ("positional arguments", "options")
                parts.append("" if plain else f"**{title}**\n")
                parts.append("\n".join(["| option | |", "|---|---|", *rows]) + "\n")
    return "\n".join(part for part in parts if part)


def shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and action.dest != "help"


def row(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or action.dest.upper()
    takes = action.nargs != 0 and action.option_strings
    value = f" {action.metavar}" if takes and isinstance(action.metavar, str) else ""
    several = " ..." if action.nargs == "+" else ""
    cells = f"`{names}{value}{several}`", (action.help or "").replace("%%", "%")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    write_atomic(PAGE, page().encode())
