"""A heavier target that says the same: more layers and wider ones, all of them adding zero.

A small target's step is mostly host work, which hides what speculation costs and saves. So the
target grows to the size that is asked for while the function it computes stays what it was:

- further layers stand behind the last one. Their attention and feed-forward run in full, but their
  output matrices (`o_proj`, `down_proj`) are zero, so they add 0 to the residual stream;
- every feed-forward layer gets wider. The columns of `down_proj` behind the old ones are zero.

Every hidden state a head was hooked to keeps its number and its value, so the head and its
acceptance stay valid; only the number of layers it names changes.

Adding 0 is exact in every floating-point type. A wider `down_proj` is a longer sum, which may be
added up in another order: equal but for the last bits, as with another batch size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.data.files import directory_lock, write_atomic, write_errors
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.pairing import WEIGHTS_FILE, check_pair
from vllm_specformer.places import lasting
from vllm_specformer.shapes import TargetShape
from vllm_specformer.target.files import fingerprint, read_json
from vllm_specformer.target.model import read_target_config

RECORD_FILE = "enlarged.json"
# Pre-norm decoders whose layers add their two outputs to the residual stream and do nothing else.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_WIDTH_STEP = 64  # a width that every matrix kernel likes
_STD = 0.02
_LAYER = "model.layers.{}."
_ZERO = ("self_attn.o_proj.", "mlp.down_proj.")
_WIDER_ROWS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
_WIDER_COLUMNS = "mlp.down_proj.weight"


class EnlargeError(SpecFormerError):
    """This target cannot be enlarged, or not to this size."""


@dataclass(frozen=True)
class HeavyPair:
    """Directories of the enlarged target and of the head that names it; the target's weights."""

    target: Path
    head: Path
    parameters: int


def enlarge(
    target: Path,
    head: Path,
    out: Path,
    parameters: int,
    layers: int,
    seed: int = 0,
) -> HeavyPair:
    """Make `out/target` and `out/head` of about `parameters` weights, or find them made.

    Args:
        target, head: directories of a pair that fits.
        parameters: wanted weights of layers and output matrix.
        layers: of the enlarged target.
        seed: of the weights whose outputs are thrown away.

    Raises:
        EnlargeError: an architecture whose layers do more than add, or too small a size.
        HeadConfigError, SpeculativeConfigError: the pair does not fit.
    """
    head_config = read_head_config(head)
    check_pair(head_config, read_target_config(target), str(target))
    config = read_json(target / "config.json")
    larger = _larger_config(config, str(target), parameters, layers)
    size = TargetShape.from_config(larger).parameters
    made = HeavyPair(out / "target", out / "head", size)
    record = {
        "source": lasting(target),
        "fingerprint": fingerprint(target),
        "head": lasting(head),
        "head_fingerprint": fingerprint(head),
        "num_hidden_layers": larger["num_hidden_layers"],
        "intermediate_size": larger["intermediate_size"],
        "parameters": size,
        "seed": seed,
    }
    with directory_lock(out):
        if _is_made(out, record):
            return made
        (out / RECORD_FILE).unlink(missing_ok=True)
        _write_target(target, made.target, config, larger, seed)
        _write_head(head, made.head, head_config, layers)
        write_atomic(out / RECORD_FILE, _json(record))
    return made


def _is_made(out: Path, record: Mapping[str, Any]) -> bool:
    """The record is written last, so what it describes is whole."""
    return (out / RECORD_FILE).is_file() and read_json(out / RECORD_FILE) == record


def _larger_config(
    config: Mapping[str, Any], name: str, parameters: int, layers: int
) -> dict[str, Any]:
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise EnlargeError(
            f"target {name}: architecture {architecture!r} cannot be enlarged without changing "
            f"what it says",
            f"this works for {', '.join(ARCHITECTURES)}",
        )
    if config.get("quantization_config"):
        raise EnlargeError(f"target {name}: its weights are quantised", "enlarge the original")
    shape = TargetShape.from_config(config)
    if layers <= shape.layers:
        raise EnlargeError(f"--layers {layers}: must be more than the {shape.layers} of {name}")
    larger = dict(config) | {"num_hidden_layers": layers}
    thin = TargetShape.from_config(larger | {"intermediate_size": 0}).parameters
    per_unit = 3 * shape.hidden * layers
    width = round((parameters - thin) / per_unit / _WIDTH_STEP) * _WIDTH_STEP
    if width < shape.intermediate:
        least = thin + per_unit * shape.intermediate
        raise EnlargeError(
            f"--parameters {parameters}: with {layers} layers the target has {least} already",
            "ask for more, or set fewer --layers",
        )
    larger["intermediate_size"] = width
    if config.get("layer_types"):
        kinds = list(config["layer_types"])
        larger["layer_types"] = kinds + [kinds[-1]] * (layers - len(kinds))
    return larger


def _write_target(
    source: Path, out: Path, config: dict[str, Any], larger: dict[str, Any], seed: int
) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        # Weights are written anew, and the model card is about another size.
        if (
            path.is_file()
            and not path.name.startswith("model.safetensors")
            and path.suffix in (*(".json", ".jinja", ".model", ".txt"),)
        ):
            shutil.copyfile(path, out / path.name)
    tensors = dict(_tensors(source))
    generator = torch.Generator().manual_seed(seed)
    old = config["num_hidden_layers"]
    width = larger["intermediate_size"]
    for layer in range(old):
        _widen(tensors, _LAYER.format(layer), width, generator)
    last = _LAYER.format(old - 1)
    template = {n.removeprefix(last): t for n, t in tensors.items() if n.startswith(last)}
    for layer in range(old, larger["num_hidden_layers"]):
        for name, tensor in template.items():
            tensors[_LAYER.format(layer) + name] = _idle(name, tensor, generator)
    with write_errors(str(out / WEIGHTS_FILE)):
        save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    write_atomic(out / "config.json", _json(larger))


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _widen(tensors: dict[str, Tensor], layer: str, width: int, generator: torch.Generator) -> None:
    """Rows with any weights before the activation, columns of zeros behind it."""
    for name in _WIDER_ROWS:
        old = tensors[layer + name]
        more = _random((width - old.shape[0], old.shape[1]), old.dtype, generator)
        tensors[layer + name] = torch.cat([old, more])
    old = tensors[layer + _WIDER_COLUMNS]
    zeros = old.new_zeros(old.shape[0], width - old.shape[1])
    tensors[layer + _WIDER_COLUMNS] = torch.cat([old, zeros], dim=1)


def _idle(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of a layer that adds nothing: zero where it would, ordinary elsewhere."""
    if name.startswith(_ZERO):
        return torch.zeros_like(like)
    if like.dim() == 1:  # norms; biases, where a family has them
        return torch.ones_like(like) if "norm" in name else torch.zeros_like(like)
    return _random(like.shape, like.dtype, generator)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=dtype).normal_(std=_STD, generator=generator)


def _write_head(source: Path, out: Path, config: SpecFormerConfig, layers: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copyfile(source / WEIGHTS_FILE, out / WEIGHTS_FILE)
    content = config.to_dict() | {"target_num_layers": layers}
    content["speculators_config"]["verifier"]["name_or_path"] = "../target"
    write_atomic(out / "config.json", _json(content))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
