"""Where a head begins: at another head, or at logits that are nearly equal (loss near ln V).

The slots of a new head have random states. The target's final norm scales them to the length of its
own, and its lm_head makes confident, wrong words of them: the loss begins at twice ln(V), and the
first steps only unlearn that. So each slot's bias starts in the direction for which the lm_head
makes the least difference between tokens, several times as long as what is random beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.head_fields import HeadConfigError, HeadFields
from vllm_specformer.target.ends import TargetEnds
from vllm_specformer.target.model import head_config
from vllm_specformer.training.settings import SHAPE_FIELDS

_TOKENS = 8192  # of the vocabulary, evenly spread, that stand for all
_ROWS = 256  # states at a time
_TIMES = 4.0  # the length of a bias, in lengths of the random part of a slot
_INIT_STD = 0.02  # of a head's weights, see SpecFormerHead._init_weights
# Fields of the shape that no weight depends on: another value may be asked for.
_FREE = {"context_window", "context_sinks"}
# Parts that change next to nothing when they are new (the first slot loses its Markov term).
_ADDED = {"markov_gate": True}
# Fields that are neither the target's nor of the head's shape.
_OTHER = (
    "target_name_or_path",
    "tree_ranking",
    "tree_ranking_sampled",
    "acceptance_calibration",
    "acceptance_calibration_sampled",
)


def config_of_start(
    start: Path, target: PreTrainedConfig, name: str, asked: Mapping[str, Any]
) -> SpecFormerConfig:
    """The configuration of a head that begins with another one's weights: that head's own shape.

    Args:
        start: directory of the other head.
        target, name: the target, and where the new head finds it.
        asked: fields of the shape that the user gave.

    Raises:
        HeadConfigError: it is no head, is of another shape than asked for, or for another target.
    """
    begun = read_head_config(start)
    for field, value in asked.items():
        has = getattr(begun, field)
        if field in _FREE or (not has and _ADDED.get(field) == value):
            continue
        if (list(value) if isinstance(value, tuple) else value) != has:
            raise HeadConfigError(
                f"--init {start}: its {field} is {has}, {value} was asked for",
                "leave that option out, or begin without --init",
            )
    own = SpecFormerConfig.preset("default", target, name)
    for field in HeadFields.model_fields:
        old, new = getattr(begun, field), getattr(own, field)
        if old != new and field not in (*SHAPE_FIELDS.values(), *_OTHER):
            raise HeadConfigError(
                f"--init {start}: it is for another target ({field} {old}, here {new})",
                "begin with a head of this target, or without --init",
            )
    shape = {field: getattr(begun, field) for field in SHAPE_FIELDS.values()}
    shape |= {field: asked[field] for field in (_FREE | set(_ADDED)) & asked.keys()}
    if not shape["context_window"] and "context_sinks" not in asked:
        shape["context_sinks"] = 0
    return head_config("default", target, name, **shape)


def start_from(head: SpecFormerHead, start: Path) -> None:
    """Take over all weights of the head in a directory, and its draft vocabulary.

    What `head` has beyond them begins at 0 (see `_ADDED`).

    Raises:
        OSError: its weights are not there or cannot be read.
    """
    other = SpecFormerHead.from_pretrained(start, dtype=torch.float32)
    new = {name: torch.zeros_like(value) for name, value in head.state_dict().items()}
    head.load_state_dict(new | other.state_dict())


@torch.no_grad()
def start_flat(head: SpecFormerHead, target: TargetEnds) -> None:
    """Set the slots' biases of a new head; nothing else of it is changed."""
    size = head.config.hidden_size
    direction = flattest(target, size).to(head.positional_proj.bias)
    random = _INIT_STD * size**0.5  # root mean square of a projected state, which had 1
    slots = head.config.num_draft_slots
    head.positional_proj.bias.copy_((_TIMES * random * direction).repeat(slots))


@torch.no_grad()
def flattest(target: TargetEnds, size: int) -> Tensor:
    """The state of root mean square 1 whose logits differ least, float32 [size].

    Behind a norm logits are linear in the direction of a state, so those of the unit states tell
    all: it is the last principal component of their differences between tokens.
    """
    device = target.device
    unit = torch.eye(size, device=device, dtype=target.dtype)
    columns = []
    for rows in unit.split(_ROWS):
        logits = target.logits(rows)
        step = max(1, logits.shape[-1] // _TOKENS)
        columns.append(logits[:, ::step].float())
    target.forget()  # the final norm may be hooked
    matrix = torch.cat(columns)
    matrix -= matrix.mean(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh((matrix @ matrix.T).double())
    found = vectors[:, 0]
    found = found * found[found.abs().argmax()].sign()  # of two opposite ones always the same
    return (found * size**0.5).float()
