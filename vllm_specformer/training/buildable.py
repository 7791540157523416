"""Which architectures Transformers can build, and whether a head finds its hooks in them.

The models are built without weights (device "meta") from their families' default configurations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.target.model import auto_class, check_decoder, head_config


def model_types() -> dict[str, str]:
    """Class name of every language model of Transformers -> the first of its model types."""
    found: dict[str, str] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, model_type)
    return found


def obstacles(types: Mapping[str, str]) -> dict[str, str]:
    """Why states cannot be hooked; an empty string if they can.

    Args:
        types: architecture -> model type.

    Returns:
        For each architecture.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return {name: _obstacle(name, model_type) for name, model_type in types.items()}
    finally:
        transformers.logging.set_verbosity(verbosity)


def _obstacle(architecture: str, model_type: str) -> str:
    try:
        config = AutoConfig.for_model(model_type)
        with torch.device("meta"):
            model = auto_class(config, architecture).from_config(config)
    except Exception:
        return ""  # its defaults alone make no model; a checkpoint's configuration may
    try:
        check_decoder(model, model_type)
        head_config("default", config, model_type)
    except SpecFormerError as error:
        return str(error).removeprefix(f"target {model_type}: ")
    return ""
