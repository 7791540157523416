"""Where a head begins: at logits that are nearly equal, so that its first loss is near ln(V).

The slots of a new head have random states. The target's final norm scales them to the length of its
own, and its lm_head makes confident, wrong words of them: the loss begins at twice ln(V), and the
first steps only unlearn that. So each slot's bias starts in the direction for which the lm_head
makes the least difference between tokens, several times as long as what is random beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget

_TOKENS = 8192  # of the vocabulary, evenly spread, that stand for all
_ROWS = 256  # states at a time
_TIMES = 4.0  # the length of a bias, in lengths of the random part of a slot
_INIT_STD = 0.02  # of a head's weights, see SpecFormerHead._init_weights


@torch.no_grad()
def start_flat(head: SpecFormerHead, target: HookedTarget) -> None:
    """Set the slots' biases of a new head; nothing else of it is changed."""
    size = head.config.hidden_size
    direction = flattest(target, size).to(head.positional_proj.bias)
    random = _INIT_STD * size**0.5  # root mean square of a projected state, which had 1
    slots = head.config.num_draft_slots
    head.positional_proj.bias.copy_((_TIMES * random * direction).repeat(slots))


@torch.no_grad()
def flattest(target: HookedTarget, size: int) -> Tensor:
    """The state of root mean square 1 whose logits differ least, float32 [size].

    Behind a norm logits are linear in the direction of a state, so those of the unit states tell
    all: it is the last principal component of their differences between tokens.
    """
    device = target.target.device
    unit = torch.eye(size, device=device, dtype=target.target.dtype)
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
