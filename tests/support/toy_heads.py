"""Heads with random weights for the toy target, in float64, as they are trained."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from support.training_texts import make_texts
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import PackedHead
from vllm_specformer.training.packing import collate
from vllm_specformer.training.texts import Texts

Head = TypeVar("Head", bound=PackedHead)
# A draft vocabulary of the 40 tokens: neither the first nor the last.
SCORED = torch.tensor([i for i in range(1, 39) if i % 3])


def random_head(kind: type[Head], target: PreTrainedModel, **fields: Any) -> Head:
    """Of three slots; with a draft vocabulary of `SCORED` if `fields` ask for one."""
    torch.manual_seed(1)
    fields = {"num_draft_slots": 3} | fields
    head = kind(SpecFormerConfig.preset("default", target.config, "t", **fields))
    for parameter in head.double().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if head.draft_token_ids is not None:
        head.draft_token_ids.copy_(SCORED)
    return head


def rows_of(
    target: HookedTarget, texts: Texts | None = None, batch: list[list[int]] | None = None
) -> HookedRows:
    """Packed rows of texts with the target's states; of five in three rows if nothing is said."""
    texts = make_texts(5, 40) if texts is None else texts
    fields = collate(texts, batch or [[0, 1], [2, 3], [4]], None, None)
    states, last = target(fields["input_ids"], fields["position_ids"])
    return HookedRows(states, last, **fields)
