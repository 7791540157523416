"""The command `specformer`: a table of subcommands, each in a module of its own.

A module offers its settings, `SETTINGS`, of which the flags are made, and `run(settings) -> exit
code`; `serve` alone takes the arguments as they are, since they are vLLM's. Only the module of the
subcommand in use is imported, so `specformer doctor` never waits for what training needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from vllm_specformer import __version__
from vllm_specformer.cli.extras import check_extras
from vllm_specformer.cli.flags import add_flags, read
from vllm_specformer.cli.serve import serve
from vllm_specformer.data.files import write_errors
from vllm_specformer.errors import SpecFormerError

# Takes vLLM's arguments, so none is read here.
SERVE = "serve"

# Subcommand -> (module, one line of help).
COMMANDS: dict[str, tuple[str, str]] = {
    SERVE: ("vllm_specformer.cli.serve", "run `vllm serve`, with vLLM's CPU wheel too"),
    "doctor": ("vllm_specformer.cli.doctor", "check whether SpecFormer can run in this vLLM"),
    "families": ("vllm_specformer.cli.families", "list the models a head can be trained for"),
    "distill": ("vllm_specformer.cli.distill", "let the target answer prompts, for training"),
    "train": ("vllm_specformer.cli.train", "train a head on the target's own answers"),
    "check": ("vllm_specformer.cli.check", "tell whether a head fits a target, from the files"),
    "eval": ("vllm_specformer.cli.evaluate", "measure a head offline and in the engine"),
    "bench": ("vllm_specformer.cli.bench", "compare speculation under load with real servers"),
    "plan": ("vllm_specformer.cli.plan", "choose how many tokens to draft at each batch size"),
    "enlarge": ("vllm_specformer.cli.enlarge", "make a heavy target of a light one, to measure"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code, 2 when the user has something to put right."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == [SERVE]:
        return serve(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="specformer", description="SpecFormer speculative decoding for vLLM."
    )
    parser.add_argument("--version", action="version", version=f"vllm-specformer {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen and name != SERVE:
            command = import_module(module)
            add_flags(subparser, command.SETTINGS)
            subparser.set_defaults(module=command)
    options = parser.parse_args(arguments)
    try:
        check_extras(options)
        with write_errors():
            return int(options.module.run(read(options.module.SETTINGS, options)))
    except SpecFormerError as error:
        print(f"specformer {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
