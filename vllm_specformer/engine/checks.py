"""Refuse what cannot work, before any weights are loaded, with one line that says what to do."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.engine.compat.handed_out import handed_out
from vllm_specformer.engine.compat.versions import check_chosen, check_complete, vllm_root
from vllm_specformer.engine.draws.rules import METHOD, default_method
from vllm_specformer.engine.patches.ledger import LEDGER
from vllm_specformer.engine.speculative_config import (
    TREE,
    check_fields,
    checked_tokens,
    tree_settings,
    verifies_coupled,
)
from vllm_specformer.errors import SpeculativeConfigError
from vllm_specformer.head_files import files_at_hand, names_head
from vllm_specformer.hub import is_path
from vllm_specformer.names import SPECULATORS_TYPE
from vllm_specformer.pairing import WEIGHTS_FILE, check_pair, check_weights


def is_specformer(speculative: dict[str, Any]) -> bool:
    """Whether a user's speculative config asks for SpecFormer: by method, or by naming a head.

    Raises:
        SpeculativeConfigError: it asks for another method with a SpecFormer head.
    """
    method, model = speculative.get("method"), speculative.get("model")
    if method == SPECULATORS_TYPE:
        return True
    if not model or not names_head(str(model), speculative.get("revision")):
        return False
    if method is None:
        return True
    raise SpeculativeConfigError(
        f"speculative config: method={reprlib.repr(method)} cannot draft with "
        f"model={str(model)!r}, a SpecFormer head",
        "write method='specformer', or leave it out",
    )


def check_vllm() -> None:
    """Refuse a vLLM that SpecFormer does not run on; called where somebody chooses it.

    Raises:
        IncompatibleVLLMError: the version is not supported, or lacks what we rely on.
    """
    from vllm.version import __version__

    check_chosen(__version__)


def check_patches() -> None:
    """Refuse a vLLM that could not be changed as needed; called in the workers that draft.

    Raises:
        IncompatibleVLLMError: names what is missing.
    """
    from vllm.version import __version__

    check_complete(__version__, LEDGER.problems())


def check_v1_verification(speculative_config: Any) -> None:
    """Refuse coupled verification, and trees with it, on the V1 runner.

    Raises:
        SpeculativeConfigError: it was asked for.
    """
    if tree_settings(speculative_config) is not None:
        raise SpeculativeConfigError(
            f"speculative config: {TREE} needs vLLM's V2 model runner, and this engine runs V1",
            f"set VLLM_USE_V2_MODEL_RUNNER=1, or leave {TREE!r} out: V1 drafts chains",
        )
    if verifies_coupled(speculative_config):
        raise SpeculativeConfigError(
            "speculative config: verification='coupled' needs vLLM's V2 model runner, whose "
            "sampler draws from noise keyed by seed and position, and this engine runs V1",
            "set VLLM_USE_V2_MODEL_RUNNER=1, or verification='vllm'",
        )


def check_batch_invariance(speculative_config: Any) -> None:
    """Refuse vLLM's batch invariance where a text depends on its drafts.

    The head's own kernels sum in an order that depends on the batch, so drafts may, too. Greedy
    text does not depend on them, sampled text does under vLLM's rule of verification.

    Raises:
        SpeculativeConfigError: VLLM_BATCH_INVARIANT is set, and verification is not coupled.
    """
    from vllm import envs

    if envs.VLLM_BATCH_INVARIANT and not verifies_coupled(speculative_config):
        raise SpeculativeConfigError(
            "VLLM_BATCH_INVARIANT=1: under verification='vllm' sampled text depends on the drafts, "
            "and those of a SpecFormer head on the batch",
            "set verification='coupled' (V2 model runner), or serve without speculation",
        )


def check_v2_adapters(lora_config: Any) -> None:
    """Refuse LoRA adapters of the lm_head on the V2 runner.

    It tells vLLM's LoRA logits the adapter of one row per request, but the target verifies K+1 of
    them: with any speculation they would take other requests' adapters, or what lies behind them.

    Raises:
        SpeculativeConfigError: an adapter may change the lm_head.
    """
    if lora_config is None:
        return
    modules = lora_config.target_modules
    if modules is None or any(name.rpartition(".")[-1] == "lm_head" for name in modules):
        raise SpeculativeConfigError(
            f"enable_lora with lora_target_modules={modules}: vLLM's V2 model runner cannot verify "
            "drafts of an lm_head with adapters",
            "set lora_target_modules to a list without 'lm_head', or VLLM_USE_V2_MODEL_RUNNER=0",
        )


def checked(
    speculative: dict[str, Any], target_model_config: Any, parallel_config: Any
) -> dict[str, Any]:
    """Validate a SpecFormer speculative config and return it as vLLM must see it.

    vLLM's `method` is a closed list; its "dflash" stands for what we are: a drafter that proposes
    all tokens in one pass from the target's auxiliary hidden states. The draft architecture then
    tells our head apart.

    Raises:
        SpeculativeConfigError, HeadConfigError, HeadWeightError: see their messages.
    """
    check_fields(speculative)
    head = _read_head(speculative)
    tokens = checked_tokens(speculative.get("num_speculative_tokens"), head.num_draft_slots)
    check_pair(head, target_model_config.hf_config, target_model_config.model)
    _check_states(head, target_model_config)
    _check_engine(target_model_config, parallel_config)
    _check_files(str(speculative["model"]), speculative.get("revision"), head)
    method = {METHOD: default_method(speculative)}
    return speculative | method | {"method": "dflash", "num_speculative_tokens": tokens}


_SHOWN = 200  # letters of a name, which `reprlib.repr` would cut after 30

# Ways of spreading a model over devices that the head cannot follow, and why.
_NOT_SPREAD = {
    # See docs/one-step.md, "What is refused".
    "pipeline_parallel_size": "its hidden states come from layers of every stage, and those of the "
    "last one alone are kept from being overwritten",
    "decode_context_parallel_size": "its K/V lie whole on every rank, not spread by token",
    "prefill_context_parallel_size": "its K/V lie whole on every rank, not spread by token",
}


def _check_engine(model_config: Any, parallel_config: Any) -> None:
    """Refuse what the engine is to do if a head cannot take part in it."""
    for field, reason in _NOT_SPREAD.items():
        size = getattr(parallel_config, field, 1)
        if size > 1:
            raise SpeculativeConfigError(
                f"{field}={size}: SpecFormer does not support it ({reason})",
                "use tensor parallelism, or serve without speculation",
            )
    if getattr(model_config, "runner_type", "generate") != "generate":
        raise SpeculativeConfigError(
            f"runner={model_config.runner_type!r}: this engine generates no text that SpecFormer "
            "could draft",
            "leave the speculative config out",
        )


def _read_head(speculative: dict[str, Any]) -> SpecFormerConfig:
    model = speculative.get("model")
    if not model:
        raise SpeculativeConfigError(
            "speculative config: field 'model' is missing",
            "set it to the directory or repository of a trained SpecFormer head",
        )
    try:
        if Path(str(model)).exists():
            return read_head_config(Path(str(model)))
        if is_path(str(model)):
            raise SpeculativeConfigError(
                f"speculative config: 'model' is {str(model)!r}: there is no such directory",
                "check the path",
            )
        content, _ = PreTrainedConfig.get_config_dict(
            str(model), revision=speculative.get("revision")
        )
    except OSError as error:
        raise SpeculativeConfigError(
            f"speculative config: 'model' is {str(model)[:_SHOWN]!r}, which is neither a directory "
            f"nor a repository that can be read ({str(error).splitlines()[0][:_SHOWN]})"
        ) from None
    return SpecFormerConfig.from_dict(content, _source=f" {model}")


def _check_files(model: str, revision: str | None, head: SpecFormerConfig) -> None:
    """Check the weights, as far as they are here: vLLM fetches those of a repository later."""
    directory = files_at_hand(model, revision)
    if directory is None:
        return
    if Path(model).is_dir() or (directory / WEIGHTS_FILE).is_file():
        check_weights(directory, head)


def _check_states(head: SpecFormerConfig, model_config: Any) -> None:
    """Refuse a target whose states vLLM hands out in another way than the head needs them."""
    if head.aux_hidden_state_layer_ids[0] == 0 and model_config.using_transformers_backend():
        raise SpeculativeConfigError(
            f"target {model_config.model}: vLLM runs it by its Transformers code and hands out no "
            "hidden state 0, which this head is hooked to",
            "train one with --hooks that leave 0 out, or serve without speculation",
        )


def check_target_class(vllm_config: Any) -> None:
    """Refuse a target whose vLLM class cannot hand out the head's hidden states.

    Called in the worker when the proposer is built, before the target's weights are loaded: only
    there may the model's class be imported without touching the device too early.

    Raises:
        SpeculativeConfigError: the class lacks vLLM's `SupportsEagle3` interface, or a state that
            the head is hooked to.
    """
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.model_executor.models.interfaces import supports_eagle3

    target = get_model_cls(vllm_config.model_config)
    if not supports_eagle3(target):
        raise SpeculativeConfigError(
            f"target class {target.__name__} cannot return auxiliary hidden states (it lacks "
            "vLLM's SupportsEagle3 interface), which SpecFormer drafts from",
            "serve this model without speculation",
        )
    handed = handed_out(vllm_root(), target.__module__, target.__name__)
    head = vllm_config.speculative_config.draft_model_config.hf_config.specformer
    hooks, layers = head["aux_hidden_state_layer_ids"], head["target_num_layers"]
    if handed is not None and (refusal := handed.refusal(hooks, layers)):
        raise SpeculativeConfigError(
            f"the head is hooked to states {list(hooks)}, but target class {target.__name__} "
            f"{refusal}, or serve this target without speculation"
        )
