"""Whether a head fits: its weights their configuration, and its shapes a target, from the files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.errors import SpecFormerError, SpeculativeConfigError
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.head_fields import MIN_TARGET_LAYERS, HeadConfigError

WEIGHTS_FILE = "model.safetensors"


class HeadWeightError(SpecFormerError):
    """A head's weights do not fit its configuration; the message names tensor and remedy."""


def expected_shapes(config: SpecFormerConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a head with this configuration has."""
    with torch.device("meta"):
        head = SpecFormerHead(config)
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}


def check_draft_tokens(token_ids: Tensor, config: SpecFormerConfig, place: str) -> None:
    """Refuse a draft vocabulary that is no increasing sequence of target ids.

    Args:
        token_ids: the tensor `draft_token_ids`.
        place: of the weights, for the message.

    Raises:
        HeadWeightError: not int64, out of range, not sorted, or with repetitions.
    """
    problem = None
    if token_ids.dtype != torch.int64:
        problem = f"is {str(token_ids.dtype).removeprefix('torch.')}, expected int64"
    elif token_ids[0] < 0 or token_ids[-1] >= config.vocab_size:
        problem = (
            f"reaches from {int(token_ids[0])} to {int(token_ids[-1])}, the target has tokens 0 "
            f"to {config.vocab_size - 1}"
        )
    elif not (token_ids.diff() > 0).all():
        problem = "is not strictly increasing"
    if problem:
        raise HeadWeightError(
            f"head weights{place}: tensor 'draft_token_ids' {problem}",
            "copy or train the head again",
        )


def check_weights(directory: Path, config: SpecFormerConfig) -> None:
    """Verify names, shapes, completeness and finiteness of `directory/model.safetensors`.

    Raises:
        HeadWeightError: the file is missing or truncated, a tensor is missing, unknown, misshapen
            or holds NaN or infinity, or the draft vocabulary is none of the target's.
    """
    path = directory / WEIGHTS_FILE
    remedy = "copy or train the head again"
    if not path.is_file():
        raise HeadWeightError(f"head weights {path}: the file is missing", f"{remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            _compare(path, expected_shapes(config), found)
            for name in found:
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise HeadWeightError(
                        f"head weights {path}: tensor {name!r} holds NaN or infinite values",
                        "resume the training from a checkpoint before it diverged",
                    )
            if config.draft_vocab_size:
                check_draft_tokens(file.get_tensor("draft_token_ids"), config, f" {path}")
    except SafetensorError as error:
        raise HeadWeightError(
            f"head weights {path}: the file is truncated or damaged ({error})", f"{remedy}"
        ) from None


def _compare(
    path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    problems = [f"{n!r} is missing" for n in sorted(expected.keys() - found.keys())]
    problems += [f"{n!r} is unknown" for n in sorted(found.keys() - expected.keys())]
    problems += [
        f"{n!r} has shape {list(found[n])}, expected {list(expected[n])}"
        for n in sorted(expected.keys() & found.keys())
        if expected[n] != found[n]
    ]
    if problems:
        raise HeadWeightError(
            f"head weights {path} do not fit config.json: {'; '.join(problems[:5])}"
            + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
            + "; config.json and model.safetensors must come from the same training"
        )


def check_pair(head: SpecFormerConfig, target: PreTrainedConfig, name: str) -> None:
    """Refuse a target that the head's shapes do not fit.

    Args:
        target: the target's Hugging Face configuration.
        name: of the target, for the message.

    Raises:
        SpeculativeConfigError, HeadConfigError: see their messages.
    """
    layers = target.get_text_config().num_hidden_layers
    if layers < MIN_TARGET_LAYERS:
        raise SpeculativeConfigError(
            f"target {name}: num_hidden_layers={layers}, SpecFormer needs at least "
            f"{MIN_TARGET_LAYERS} (its hooks coincide below that)",
            "serve it without speculation",
        )
    text = target.get_text_config()
    found = {
        "architecture": (target.architectures or [None])[0],
        "hidden_size": text.hidden_size,
        "num_hidden_layers": layers,
        "vocab_size": text.vocab_size,
    }
    trained = {
        "architecture": head.target_architecture,
        "hidden_size": head.hidden_size,
        "num_hidden_layers": head.target_num_layers,
        "vocab_size": head.vocab_size,
    }
    wrong = [
        f"{k} is {found[k]}, the head's is {trained[k]}" for k in found if found[k] != trained[k]
    ]
    if wrong:
        raise HeadConfigError(
            f"the head was trained for another target than {name}: {'; '.join(wrong)}",
            "use the head of this target, or train one for it",
        )
