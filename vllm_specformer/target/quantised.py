"""Targets whose weights are quantised: whether they can be unpacked here, told from the files.

Training runs the target in Transformers, which unpacks quantised weights with packages of their
own; GPTQ and AWQ need none (see `packed_weights`). What is missing is named before any weights are
read, all of it in one line.
"""

from __future__ import annotations

import re
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from vllm_specformer.target import packed_weights
from vllm_specformer.target.unsupported import UnsupportedTargetError

# What Transformers imports to unpack these; the names are those of the packages and, behind the
# colon, of the modules where they differ.
_PACKAGES = {
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed-tensors:compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
}
_INSTEAD = (
    "distil and train with the checkpoint it was quantised from: a head of that one fits this one"
)
_RUN_BY_VLLM = "take `specformer train --states vllm`"
_QUANTISED = r"\.(weight_packed|weight_scale\w*|qweight)$"
_EMBEDDING = re.compile(rf"(embed_tokens|word_embeddings|wte){_QUANTISED}")
_OUTPUT = re.compile(rf"(lm_head|embed_out){_QUANTISED}")


class CannotUnpackError(UnsupportedTargetError):
    """Transformers cannot unpack a target's weights here; vLLM may run it all the same."""


def check_quantised(config: PreTrainedConfig, directory: Path) -> None:
    """Refuse quantised weights that Transformers cannot unpack on this machine.

    Args:
        config: the target's configuration.
        directory: its files; of the weights the tables of tensors are read.

    Raises:
        CannotUnpackError: a package is missing, the method is unknown or needs another device.
        UnsupportedTargetError: the embedding is quantised.
    """
    described = _described(config)
    if described is None:
        return
    method = str(described.get("quant_method"))
    whose = f"target {directory}: its weights are quantised ({method})"
    if packed_weights.obstacle(described):
        _check_packages(method, whose)
        _ask_transformers(described, whose)
    if any(_EMBEDDING.search(name) for name in _tensors(directory)):
        raise UnsupportedTargetError(
            f"{whose}, its embedding among them, which Transformers cannot unpack",
            f"quantise it again with the embedding left as it is, or {_INSTEAD}",
        )


def packed(config: PreTrainedConfig) -> tuple[dict[str, Any], PreTrainedConfig] | None:
    """For weights that `packed_weights` reads: their description, and the configuration without it.

    None for all others.
    """
    described = _described(config)
    if described is None or packed_weights.obstacle(described):
        return None
    return described, plain(config)


def plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration without a description of quantised weights."""
    changed = deepcopy(config)
    for place in (changed, changed.get_text_config()):
        if hasattr(place, "quantization_config"):
            del place.quantization_config
    return changed


def output_is_quantised(directory: Path) -> bool:
    """Whether embedding or lm_head are quantised in these files, which is rare."""
    ends = (_EMBEDDING, _OUTPUT)
    return any(end.search(name) for name in _tensors(directory) for end in ends)


def _described(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The configuration's description of the quantisation, if there is one."""
    for place in (config, config.get_text_config()):
        described = getattr(place, "quantization_config", None)
        if described is not None:
            return described if isinstance(described, dict) else described.to_dict()
    return None


def _check_packages(method: str, whose: str) -> None:
    packages = [entry.partition(":") for entry in _PACKAGES.get(method, ())]
    missing = [name for name, _, module in packages if find_spec(module or name) is None]
    if missing:
        raise CannotUnpackError(
            f"{whose}, and Transformers cannot unpack them without {' and '.join(missing)}",
            f"pip install {' '.join(missing)}, {_RUN_BY_VLLM}, or {_INSTEAD}",
        )


def _ask_transformers(described: dict[str, Any], whose: str) -> None:
    """Do what `from_pretrained` does before it reads weights."""
    try:
        if not AutoHfQuantizer.supports_quant_method(described):
            raise ValueError(f"it knows {', '.join(sorted(AUTO_QUANTIZER_MAPPING))}")
        quantizer = AutoHfQuantizer.from_config(dict(described), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # each method raises its own
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CannotUnpackError(
            f"{whose}, and Transformers cannot unpack them here ({reason})",
            f"mend that, {_RUN_BY_VLLM}, or {_INSTEAD}",
        ) from None


def _tensors(directory: Path) -> list[str]:
    """The names of all tensors in a directory's safetensors files."""
    names: list[str] = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names
