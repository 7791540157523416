"""How vLLM comes to know SpecFormer: the model, the format of its checkpoints, the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import extend, patch
from vllm_specformer.engine.speculative_config import (
    OwnFields,
    as_dictionary,
    split_own_fields,
    with_tree,
)
from vllm_specformer.names import ARCHITECTURE, SPECULATORS_TYPE

# Count up when what the plugin adds to the target's graph changes (see `hooked_states`): vLLM keeps
# compiled targets, and takes one from a release before for as good.
GRAPH = 1


@extend(
    "vllm.model_executor.models.registry:ModelRegistry",
    why="adds the architecture SpecFormerDraftModel (official plugin interface)",
    guard="only if the architecture is not registered yet",
)
def add_model(registry: Any) -> None:
    if ARCHITECTURE not in registry.get_supported_archs():
        registry.register_model(ARCHITECTURE, "vllm_specformer.engine.model:SpecFormerDraftModel")


def to_vllm_config(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Speculators format -> the draft model's Hugging Face configuration, as vLLM's converters do.

    `pre_trained_config` starts as the head's layer section and is completed in place.
    """
    from vllm_specformer.config import flat_fields

    fields = flat_fields(config_dict)
    pre_trained_config.update(
        architectures=[ARCHITECTURE],
        num_hidden_layers=1,
        is_causal=True,  # keeps vLLM from asking for a non-causal backend for our one layer
        mask_token_id=0,  # required of parallel drafters; our slots are not made from a token
        eagle_aux_hidden_state_layer_ids=list(fields["aux_hidden_state_layer_ids"]),
        specformer_graph=GRAPH,  # a part of what vLLM looks compiled graphs up by
        specformer=fields,
    )


@extend(
    "vllm.transformers_utils.configs.speculators.algos:SUPPORTED_SPECULATORS_TYPES",
    why="adds the converter of head configurations in speculators format, so that "
    "`vllm serve HEAD` works",
    guard="only if 'specformer' has no converter yet; adds a key, replaces none",
)
def add_format(converters: dict[str, Any]) -> None:
    converters.setdefault(SPECULATORS_TYPE, to_vllm_config)


_ASKED_BY = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
# What a user can write; any other object is none that asks for SpecFormer.
_WRITTEN = (dict, list, str, int, float)


@patch(
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    why="vLLM's `method` is a closed list: validates a SpecFormer config and passes it on as "
    "'dflash', vLLM's word for one-pass drafting from hidden states",
    guard="acts only on method 'specformer' or a SpecFormer head",
    parameters="target_model_config target_parallel_config",
)
def create_speculative_config(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    # Nothing but this stands between vLLM and users who do not ask for SpecFormer, on any version.
    speculative = _asked(self)
    if speculative is None:
        return original(self, *args, **kwargs)
    from vllm_specformer.engine.checks import check_vllm

    check_vllm()
    return _create(original, self, speculative, *args, **kwargs)


def _asked(arguments: Any) -> dict[str, Any] | None:
    """The speculative config of engine arguments if it asks for SpecFormer."""
    written = getattr(arguments, "speculative_config", None) or {}
    flags = {
        "method": getattr(arguments, "spec_method", None),
        "model": getattr(arguments, "spec_model", None),
        "num_speculative_tokens": getattr(arguments, "spec_tokens", None),
    }
    no_speculation = not written and all(v is None for v in flags.values())
    if no_speculation or not isinstance(written, _WRITTEN):
        return None
    from vllm_specformer.engine.checks import is_specformer

    # The --spec-* flags are another spelling of the same dictionary; merge before judging.
    given = as_dictionary(written)
    merged = {k: v for k, v in flags.items() if v is not None and k not in given} | given
    clash = any(v is not None and k in given for k, v in flags.items())
    return merged if not clash and is_specformer(merged) else None


def _create(
    original: Callable[..., Any],
    arguments: Any,
    speculative: dict[str, Any],
    target_model_config: Any,
    target_parallel_config: Any,
) -> Any:
    """vLLM's speculative config for what asks for SpecFormer."""
    from vllm_specformer.engine.checks import checked
    from vllm_specformer.engine.metrics import publish

    speculative, own = split_own_fields(speculative)
    asked = {name: getattr(arguments, name, None) for name in _ASKED_BY}
    checks = checked(speculative, target_model_config, target_parallel_config)
    slots = checks["num_speculative_tokens"]
    arguments.speculative_config = with_tree(checks, own)
    arguments.spec_method = arguments.spec_model = arguments.spec_tokens = None
    publish()
    try:
        config = original(arguments, target_model_config, target_parallel_config)
    finally:  # these arguments may be asked for a configuration once more
        vars(arguments).update(asked)
    if own != OwnFields():
        # vLLM's config has no field for them; the head's own config travels to every worker.
        config.draft_model_config.hf_config.specformer_verification = own.verification
        config.draft_model_config.hf_config.specformer_confidence = own.confidence
        if own.tree_nodes is not None:
            tree = {"nodes": own.tree_nodes, "slots": slots}
            config.draft_model_config.hf_config.specformer_tree = tree
    return config
