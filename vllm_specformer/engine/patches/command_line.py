"""What a command line names: the method in `--spec-method`, a head in `vllm serve HEAD`."""

from __future__ import annotations

import functools
from typing import Any

from vllm_specformer.config import SPECULATORS_TYPE, read_head_config
from vllm_specformer.head_files import files_at_hand
from vllm_specformer.places import named_target

_MARK = "_specformer_patched"


def offer_method() -> None:
    """Let `--spec-method` take "specformer", beside the methods of vLLM's own closed list.

    vLLM loads plugins before it adds these arguments, so that they can change the parser.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        for action in parser._actions:
            if action.dest == "spec_method" and action.choices:
                action.choices = [SPECULATORS_TYPE, *action.choices]
        return parser

    setattr(add_cli_args, _MARK, True)
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def find_target_of_head() -> None:
    """Read the target's path in a head's `config.json` from that file on, in `vllm serve HEAD`.

    vLLM takes it from the working directory, and its error then names a path nobody gave. From 0.33
    on vLLM refuses every path here itself.
    """
    from vllm.engine import arg_utils

    original = arg_utils.maybe_override_with_speculators
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def maybe_override_with_speculators(
        model: str, *args: Any, revision: str | None = None, **kwargs: Any
    ) -> Any:
        target, tokenizer, speculative = original(model, *args, revision=revision, **kwargs)
        if target == model or speculative["method"] != SPECULATORS_TYPE:
            return target, tokenizer, speculative
        head = files_at_hand(model, revision)
        if head is not None:
            target = tokenizer = named_target(head, read_head_config(head))
        return target, tokenizer, speculative

    setattr(maybe_override_with_speculators, _MARK, True)
    arg_utils.maybe_override_with_speculators = maybe_override_with_speculators
