"""Load of a target only what stands around its layers: embedding, final norm and lm_head.

They are all that training needs where the hidden states come from elsewhere. Their weights are
plain in nearly every quantised checkpoint, too, so no package has to unpack anything.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from vllm_specformer.target.ends import find_decoder
from vllm_specformer.target.model import (
    auto_class,
    built,
    call_hooks,
    check_decoder,
    read_target_config,
)
from vllm_specformer.target.packed_weights import read_unpacked
from vllm_specformer.target.parts import NORM_NAMES, find_part
from vllm_specformer.target.quantised import check_quantised, output_is_quantised, packed, plain
from vllm_specformer.target.unsupported import UnsupportedTargetError

_OF_A_LAYER = re.compile(r"\b(layers|h)\.\d+\.")


def load_ends(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The target's language model with no layers, frozen.

    Raises:
        UnsupportedTargetError: Transformers cannot build it, its embedding or lm_head is quantised
            in a way that cannot be unpacked here, or its files lack one of the three parts.
    """
    config = read_target_config(directory)
    if output_is_quantised(directory):
        check_quantised(config, directory)
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it lists all layers as superfluous
    try:
        model, info = built(directory, _from_files, directory, config, dtype)
    finally:
        transformers.utils.logging.set_verbosity(level)
    lost = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if lacking := sorted(lost & _names_of_ends(model)):
        raise UnsupportedTargetError(
            f"target {directory}: its files lack {', '.join(lacking)}",
            "copy or download them again",
        )
    model = model.to(device).eval()
    call_hooks(model)
    return model.requires_grad_(False)


def count_parameters(directory: Path) -> int:
    """Numbers of the whole target's weights, from its configuration.

    Raises:
        UnsupportedTargetError: Transformers cannot build it, or it has no stack of layers.
    """
    config = plain(read_target_config(directory))
    with torch.device("meta"):
        model = built(directory, auto_class(config).from_config, config)
    check_decoder(model, str(directory))
    return sum(parameter.numel() for parameter in model.parameters())


def without_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same model with no layers."""
    bare = deepcopy(config)
    text = bare.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, [])
    text.num_hidden_layers = 0
    return bare


def _from_files(directory: Path, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model, and what Transformers says about its loading."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # tables with a column per layer
    }
    kind = auto_class(config)
    if not output_is_quantised(directory):
        return kind.from_pretrained(directory, config=without_layers(plain(config)), **options)
    if (found := packed(config)) is None:
        return kind.from_pretrained(directory, config=without_layers(config), **options)
    described, unpacked = found
    weights = read_unpacked(
        directory, described, dtype, lambda name: _OF_A_LAYER.search(name) is None
    )
    bare = without_layers(unpacked)
    with torch.device("meta"):
        model = type(auto_class(bare).from_config(bare))  # an auto class wants files
    return model.from_pretrained(None, config=bare, state_dict=weights, **options)


def _names_of_ends(model: PreTrainedModel) -> set[str]:
    """Names of the weights of embedding, final norm and lm_head, all they go by."""
    norm = find_part(find_decoder(model), NORM_NAMES)
    ends = (model.get_input_embeddings(), norm, model.get_output_embeddings())
    own = {id(value) for end in ends for value in end.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, value in named if id(value) in own}
