"""What a command line names: the method in `--spec-method`, a head in `vllm serve HEAD`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import patch
from vllm_specformer.names import SPECULATORS_TYPE


@patch(
    "vllm.engine.arg_utils:EngineArgs.add_cli_args",
    why="`--spec-method` takes the methods of vLLM's closed list only: adds 'specformer'",
    guard="adds one choice to one argument",
    parameters="parser",
)
def add_cli_args(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """vLLM loads plugins before it adds these arguments, so that they can change the parser."""
    parser = original(*args, **kwargs)
    for action in parser._actions:
        if action.dest == "spec_method" and action.choices:
            action.choices = [SPECULATORS_TYPE, *action.choices]
    return parser


@patch(
    "vllm.engine.arg_utils:maybe_override_with_speculators",
    imported=True,
    why="`vllm serve HEAD` takes a relative path in the head's file from the working directory, "
    "and its error names a path nobody gave: takes it from the file",
    guard="acts on the target that a SpecFormer head names; from 0.33 on vLLM itself refuses paths",
)
def find_target_of_head(
    original: Callable[..., Any],
    model: str,
    *args: Any,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    target, tokenizer, speculative = original(model, *args, revision=revision, **kwargs)
    if target == model or speculative["method"] != SPECULATORS_TYPE:
        return target, tokenizer, speculative
    from vllm_specformer.config import read_head_config
    from vllm_specformer.head_files import files_at_hand
    from vllm_specformer.places import named_target

    head = files_at_hand(model, revision)
    if head is not None:
        target = tokenizer = named_target(head, read_head_config(head))
    return target, tokenizer, speculative
