"""Load a frozen target, and find out by running it whether a head can be trained for it.

Families differ in ways that a configuration does not tell reliably: scaled embeddings, softcapped
logits, masks of their own. So the loaded model is asked: do its parts, put together as the head
uses them, give what the whole gives?
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.families import read_families
from vllm_specformer.head_fields import HeadConfigError
from vllm_specformer.target.ends import find_decoder
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.packed_weights import read_unpacked
from vllm_specformer.target.parts import LAYER_NAMES, NORM_NAMES, find_part
from vllm_specformer.target.quantised import check_quantised, packed
from vllm_specformer.target.unsupported import UnsupportedTargetError

# The same operation on the same values; only another order of summation may differ.
_SAME = 1e-4
# States of a text whose neighbour in the row changed. A mask makes them equal; a mixture of experts
# may sum in another order. Attention that reaches the neighbour moves them by tens of per cent.
_UNMOVED = 1e-2
_PROBE_LENGTH = 12


def head_config(
    preset: str, target: PreTrainedConfig, name: str, **changes: object
) -> SpecFormerConfig:
    """`SpecFormerConfig.preset`, with what stands against a head for this target named.

    Raises:
        UnsupportedTargetError: the target is unsuitable, or a field is out of range.
    """
    try:
        config = SpecFormerConfig.preset(preset, target, name, **(_default_hooks(target) | changes))
    except HeadConfigError as error:
        raise UnsupportedTargetError(f"target {name}: {error}") from None
    except AttributeError as error:
        raise UnsupportedTargetError(
            f"target {name}: its configuration ({type(target).__name__}) has no {error.name!r}, "
            "which the head's shape is taken from",
            "this family is not supported",
        ) from None
    _check_served(config, name)
    return config


def _default_hooks(target: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The hooks to choose where vLLM is known not to hand out the paper's."""
    family = read_families().find((target.architectures or [""])[0])
    if family is None or not family.hands_out_states:
        return {}
    layers = target.get_text_config().num_hidden_layers
    return {"aux_hidden_state_layer_ids": family.handed_out.default_hooks(layers)}


def _check_served(config: SpecFormerConfig, name: str) -> None:
    """Refuse what is known not to work when it is served (see `families.py`)."""
    known = read_families()
    family = known.find(config.target_architecture)
    if family is None:
        return
    if not family.hands_out_states:
        raise UnsupportedTargetError(
            f"target {name}: vLLM {known.vllm} serves {family.architecture} with a class "
            f"({family.served_by}) that cannot return hidden states, which heads draft from",
            "`specformer families` lists the models that can have one",
        )
    hooks, layers = config.aux_hidden_state_layer_ids, config.target_num_layers
    if refusal := family.handed_out.refusal(hooks, layers):
        raise UnsupportedTargetError(
            f"target {name}: vLLM {known.vllm}'s class for {family.architecture} {refusal}"
        )


def read_target_config(directory: Path) -> PreTrainedConfig:
    """The target's configuration.

    Raises:
        UnsupportedTargetError: this release of Transformers does not know the family.
    """
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedTargetError(
            f"target {directory}: Transformers {transformers.__version__} cannot read its "
            f"configuration ({reason})",
            "a newer release may know the family",
        ) from None


def check_trainable(directory: Path) -> None:
    """Refuse a target that `load_target` and the head's hooks will not take, without its weights.

    What only running it tells (`check_parts`) is left.

    Args:
        directory: the target's files.

    Raises:
        UnsupportedTargetError: see its message.
    """
    config = read_target_config(directory)
    head_config("default", config, str(directory))
    check_quantised(config, directory)
    with torch.device("meta"):
        check_decoder(built(directory, auto_class(config).from_config, config), str(directory))


def load_target(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The target's language model, frozen; quantised weights are unpacked.

    Raises:
        UnsupportedTargetError: Transformers cannot build it, weights of it are missing, or it has
            no stack of layers.
    """
    config = read_target_config(directory)
    check_quantised(config, directory)
    model, info = built(directory, _from_files, directory, config, dtype)
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedTargetError(
            f"target {directory}: its files lack {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more tensors" if len(missing) > 3 else ""),
            "copy or download them again",
        )
    check_decoder(model, str(directory))
    model = model.to(device).eval()
    call_hooks(model)
    return model.requires_grad_(False)


def auto_class(config: PreTrainedConfig, architecture: str | None = None) -> Any:
    """Which of Transformers' auto classes builds a target, by its configuration.

    A model that also reads images or sound is built whole, with its encoders: they are not run.

    Args:
        architecture: if another than the configuration names.
    """
    named = architecture or (config.architectures or [None])[0]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    is_multimodal = multimodal is not None and (causal is None or named == multimodal != causal)
    return AutoModelForMultimodalLM if is_multimodal else AutoModelForCausalLM


def _from_files(directory: Path, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model, and what Transformers says about its loading."""
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if (found := packed(config)) is None:
        return auto_class(config).from_pretrained(directory, **options)
    described, plain = found
    weights = read_unpacked(directory, described, dtype)
    with torch.device("meta"):
        kind = type(auto_class(plain).from_config(plain))  # an auto class wants files
    return kind.from_pretrained(None, config=plain, state_dict=weights, **options)


def built(directory: Path, build: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `build` makes of the target, with its errors explained."""
    try:
        return build(*args, **options)
    except (ValueError, KeyError, ImportError, OSError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedTargetError(
            f"target {directory}: Transformers cannot load it as a language model ({reason})"
        ) from None


@torch.no_grad()
def call_hooks(model: PreTrainedModel) -> None:
    """Run the whole model once if it has hooks: its parts are called by themselves later.

    compressed-tensors unpacks all weights in a hook of the outermost module, at its first call.
    """
    if model._forward_pre_hooks or model._forward_hooks:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=token, use_cache=False)


def check_decoder(model: PreTrainedModel, name: str) -> None:
    """The decoder must have layers and a final norm to hook.

    Raises:
        UnsupportedTargetError: it has not.
    """
    for part in (LAYER_NAMES, NORM_NAMES):
        try:
            find_part(find_decoder(model), part)
        except AttributeError as error:
            raise UnsupportedTargetError(
                f"target {name}: its decoder keeps its parts elsewhere ({error})",
                "hidden states cannot be hooked there, this family is not supported",
            ) from None


@torch.no_grad()
def check_parts(target: HookedTarget, name: str) -> None:
    """Embedding, final norm and lm_head must be all there is around the layers.

    Raises:
        UnsupportedTargetError: naming what is different.
    """
    tokens = _probe_tokens(target)[:, :_PROBE_LENGTH]
    states, last = target(tokens)
    whole = target.target(input_ids=tokens, use_cache=False).logits
    if not _close(target.lm_head(last), whole, _SAME):
        raise UnsupportedTargetError(
            f"target {name}: its logits are not lm_head(norm(state)), scaled or capped; it does "
            "something more to them, which the head's drafts would lack",
            "this family is not supported",
        )
    some = torch.arange(0, whole.shape[-1], 97, device=whole.device)
    if not _close(target.lm_head_of(some)(last), whole[..., some], _SAME):
        raise UnsupportedTargetError(
            f"target {name}: its lm_head is more than a matrix and a bias, so it cannot score some "
            "of its tokens alone, which training does",
            "this family is not supported",
        )
    if target.hook_ids[0] == 0 and not parallel(target.embed(tokens), states[0]):
        raise UnsupportedTargetError(
            f"target {name}: its first layer does not read the embedding, up to one factor (a "
            "position is added, or a norm comes first)",
            "this family is not supported",
        )
    if target.hook_ids[-1] == len(target.layers) and not _close(
        target.norm(states[-1]), last, _SAME
    ):
        raise UnsupportedTargetError(
            f"target {name}: its last state does not pass through its final norm alone",
            "this family is not supported",
        )


@torch.no_grad()
def can_pack(target: HookedTarget) -> bool:
    """Whether texts that share a row do not see each other in this target.

    The second text of every row stays, the first one changes: the second one's states must stay
    too. Two rows, because some attentions take a row for packed only when it is alone.
    """
    tokens = _probe_tokens(target)
    positions = torch.arange(_PROBE_LENGTH, device=tokens.device).repeat(2, 2)
    changed = tokens.clone()
    changed[:, :_PROBE_LENGTH] = tokens[:, :_PROBE_LENGTH].roll(1, dims=1)
    try:
        one, _ = target(tokens, positions)
        other, _ = target(changed, positions)
    except (TypeError, ValueError, RuntimeError):  # no position_ids, or not of this shape
        target.forget()
        return False
    return all(
        _close(a[:, _PROBE_LENGTH:], b[:, _PROBE_LENGTH:], _UNMOVED)
        for a, b in zip(one, other, strict=True)
    )


def _probe_tokens(target: HookedTarget) -> Tensor:
    """Two rows of two texts of random tokens."""
    vocabulary = target.target.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, 2 * _PROBE_LENGTH), generator=generator)
    return tokens.to(target.device)


def parallel(a: Tensor, b: Tensor) -> bool:
    """Whether one is the other times a positive factor."""
    a, b = a.float(), b.float()
    factor = (a * b).sum() / a.square().sum()
    return bool(factor > 0) and _close(factor * a, b, _SAME)


def _close(a: Tensor, b: Tensor, share: float) -> bool:
    """Whether the difference's norm is below this share of the norm."""
    return bool((a.float() - b.float()).norm() <= share * b.float().norm())
