"""Configuration of a SpecFormer head: its file, and a head for a target.

On disk a head is a checkpoint in the *speculators* format, which vLLM reads natively: the shape of
the head's layer under `transformer_layer_config`, the target under
`speculators_config.verifier`, and our own fields at the top level. In memory it is a flat
`SpecFormerConfig`. `head_fields.HeadFields` is the single definition of the fields; unknown or
missing ones are refused by name.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from vllm_specformer.head_fields import MIN_TARGET_LAYERS, HeadConfigError, HeadFields
from vllm_specformer.names import ARCHITECTURE, SPECULATORS_TYPE

FORMAT_VERSION = "1"
# Written by Transformers or the speculators format itself; they carry no choice of ours.
_BOOKKEEPING = {
    "architectures",
    "dtype",
    "format_version",
    "model_type",
    "speculators_config",
    "speculators_model_type",
    "transformer_layer_config",
    "transformers_version",
    "_name_or_path",
}
_LAYER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)


def paper_hooks(num_layers: int) -> tuple[int, ...]:
    """Hooks of the paper: embedding output, middle, last but one, last (`HS[0, L/2, L-1, L]`).

    Raises:
        HeadConfigError: for fewer than four layers, where hooks would coincide.
    """
    if num_layers < MIN_TARGET_LAYERS:
        raise HeadConfigError(
            f"num_hidden_layers={num_layers}, the target needs at least {MIN_TARGET_LAYERS}: "
            "the hooks 0, L/2, L-1 and L of a shallower one coincide, choose a deeper target"
        )
    return (0, num_layers // 2, num_layers - 1, num_layers)


def _narrowest_layer(text: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the layer whose attention heads are smallest, where layers differ.

    Gemma 4's full-attention layers have heads of 512, which is beyond our kernels and needless.
    """
    if not getattr(text, "is_heterogeneous", False):
        return text
    return min(text.per_layer_config, key=lambda layer: layer.head_dim)


def _intermediate_size(layer: PreTrainedConfig) -> int:
    """Width of the feed-forward layer; where all are mixtures, of the experts a token runs."""
    if getattr(layer, "intermediate_size", None):
        return int(layer.intermediate_size)
    if getattr(layer, "moe_intermediate_size", None):
        return int(layer.moe_intermediate_size * layer.num_experts_per_tok)
    return 4 * int(layer.hidden_size)


def _norm_eps(text: PreTrainedConfig) -> float:
    """Epsilon of the target's norms, whatever their kind."""
    names = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps")
    return next((float(eps) for n in names if (eps := getattr(text, n, None))), 1e-6)


def _rope_theta(text: PreTrainedConfig) -> float:
    """Base of the rotary embedding; where layers differ, that of full attention, as ours is."""
    rope = getattr(text, "rope_parameters", None) or {}
    return float(rope.get("full_attention", rope).get("rope_theta", 10_000.0))


def _explain(error: ValidationError, where: str) -> HeadConfigError:
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        given = reprlib.repr(item["input"])
        if item["type"] == "missing":
            lines.append(f"field {field!r} is missing; add it or train the head again")
        elif item["type"] == "extra_forbidden":
            lines.append(
                f"field {field!r} with value {given} is unknown; remove it or "
                "install the vllm-specformer release that wrote this head"
            )
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = f"field {field!r} with value {given}: " if item["loc"] else ""
            lines.append(value + message)
    return HeadConfigError(f"SpecFormer head config{where}: " + "; ".join(lines))


class SpecFormerConfig(PreTrainedConfig):
    """Hugging Face face of `HeadFields`; every field is an attribute of the same name.

    Raises:
        HeadConfigError: when a field is missing, unknown or out of range.
    """

    model_type = SPECULATORS_TYPE
    has_no_defaults_at_init = True

    def __init__(self, /, **fields: Any) -> None:
        known = {k: v for k, v in fields.items() if k in HeadFields.model_fields}
        rest = {k: v for k, v in fields.items() if k not in known}
        internal = {k: rest.pop(k) for k in list(rest) if k in _BOOKKEEPING or k.startswith("_")}
        try:
            head = HeadFields(**known, **rest)
        except ValidationError as error:
            raise _explain(error, str(internal.get("_source", ""))) from None
        for name, value in head.model_dump().items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        super().__init__(architectures=[ARCHITECTURE], dtype=internal.get("dtype"))

    @property
    def num_scored_tokens(self) -> int:
        """Width of the head's logits: the draft vocabulary's size, or the target's."""
        return self.draft_vocab_size or self.vocab_size

    @classmethod
    def preset(
        cls, name: str, target: PreTrainedConfig, target_path: str, **changes: Any
    ) -> SpecFormerConfig:
        """A head for `target`: `"paper"` as published, `"default"` with what we measured to help.

        Args:
            name: `"paper"` (slots see each other only and not the bonus token) or `"default"`
                (bonus-token embedding, slots also see the context).
            target: Hugging Face configuration of the target.
            target_path: model name or path under which the target is served.
            changes: any field of `HeadFields` to override.

        Raises:
            HeadConfigError: unknown preset, unsuitable target, bad field.
        """
        choices = {
            "paper": {
                "use_bonus_embedding": False,
                "slot_mask": "slots",
                "markov_rank": 0,
                "nested_slots": False,
            },
            "default": {
                "use_bonus_embedding": True,
                "slot_mask": "mixed",
                "markov_rank": 0,
                "nested_slots": True,
            },
        }
        if name not in choices:
            raise HeadConfigError(f"preset={name!r} is unknown", f"choose one of {sorted(choices)}")
        text = target.get_text_config()
        layer = _narrowest_layer(text)
        heads = layer.num_attention_heads
        fields = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or heads,
            "head_dim": getattr(layer, "head_dim", None) or text.hidden_size // heads,
            "intermediate_size": _intermediate_size(layer),
            "rms_norm_eps": _norm_eps(text),
            "rope_theta": _rope_theta(text),
            "max_position_embeddings": text.max_position_embeddings,
            "num_draft_slots": 8,
            "aux_hidden_state_layer_ids": paper_hooks(text.num_hidden_layers),
            "target_architecture": (target.architectures or [type(target).__name__])[0],
            "target_num_layers": text.num_hidden_layers,
            "target_name_or_path": target_path,
        }
        return cls(**(fields | choices[name] | changes))

    def to_dict(self) -> dict[str, Any]:
        """The speculators-format dictionary that is written as `config.json`."""
        own = {name: getattr(self, name) for name in HeadFields.model_fields}
        layer = {name: own.pop(name) for name in _LAYER_FIELDS}
        target = own.pop("target_name_or_path")
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype is not None else None
        return {
            "architectures": [ARCHITECTURE],
            "format_version": FORMAT_VERSION,
            "dtype": dtype,
            "speculators_model_type": SPECULATORS_TYPE,
            "speculators_config": {
                "algorithm": SPECULATORS_TYPE,
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": self.num_draft_slots}
                ],
                "verifier": {
                    "name_or_path": target,
                    "architectures": [self.target_architecture],
                },
            },
            "transformer_layer_config": layer,
            **own,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Same as `to_dict`: a head states every choice, it relies on no default."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a speculators-format (or flat) dictionary.

        Raises:
            HeadConfigError: when the dictionary is not a SpecFormer head or a field is bad.
        """
        unused = kwargs.pop("return_unused_kwargs", False)
        source = kwargs.pop("_source", "")
        config = cls(_source=source, **flat_fields(config_dict, source))
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if dtype is not None and dtype != "auto":
            config.dtype = dtype
        return (config, kwargs) if unused else config


def flat_fields(config: dict[str, Any], source: str = "") -> dict[str, Any]:
    """Flatten a speculators-format dictionary into the fields of `HeadFields`.

    Raises:
        HeadConfigError: when it describes another kind of speculator or lacks a section.
    """
    if not isinstance(config, dict):
        raise HeadConfigError(
            f"SpecFormer head config{source}: the file holds {reprlib.repr(config)} in place of an "
            "object of fields",
            "copy or train the head again",
        )
    kind = config.get("speculators_model_type")
    if kind != SPECULATORS_TYPE:
        raise HeadConfigError(
            f"SpecFormer head config{source}: field 'speculators_model_type' is {kind!r}, expected "
            f"{SPECULATORS_TYPE!r}",
            "the speculative config's 'model' must name a SpecFormer head, "
            "not a target or another kind of speculator",
        )
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, dict):
        raise HeadConfigError(
            f"SpecFormer head config{source}: field 'transformer_layer_config' is missing",
            "the file is incomplete, train or download the head again",
        )
    own = _choices(config)
    verifier = _section(_section(config, "speculators_config", source), "verifier", source)
    if "name_or_path" in verifier:
        own["target_name_or_path"] = verifier["name_or_path"]
    return own | {k: v for k, v in _choices(layer).items() if k in _LAYER_FIELDS or k not in own}


def _choices(section: dict[str, Any]) -> dict[str, Any]:
    """What is ours in a section of a file.

    vLLM's own converter writes into the layer section, too; see engine/patches/registration.py.
    """
    return {k: v for k, v in section.items() if not (k in _BOOKKEEPING or k.startswith("_"))}


def _section(config: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """The object under `name`, empty where there is none."""
    section = config.get(name)
    if section is not None and not isinstance(section, dict):
        raise HeadConfigError(
            f"SpecFormer head config{source}: field {name!r} is {reprlib.repr(section)}, expected "
            "an object",
            "copy or train the head again",
        )
    return section or {}


def read_head_config(directory: Path) -> SpecFormerConfig:
    """Read and validate `config.json` of a head directory.

    Raises:
        HeadConfigError: no such file, not JSON, or a bad field; the message names the file.
    """
    path = directory / "config.json"
    source = f" {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HeadConfigError(
            f"SpecFormer head {directory}: config.json is missing",
            "'model' must name a directory that holds a trained head",
        ) from None
    except OSError as error:
        raise HeadConfigError(
            f"SpecFormer head config{source}: cannot be read ({error.strerror})",
            "'model' must name a directory whose files this user may read",
        ) from None
    # Broken text, broken JSON, a number of thousands of digits; or nested without end.
    except (ValueError, RecursionError) as error:
        raise HeadConfigError(
            f"SpecFormer head config{source}: not valid JSON ({error})",
            "copy or train the head again",
        ) from None
    return SpecFormerConfig.from_dict(content, _source=source)
