"""The dense head on the very hidden states that the engine's target handed out.

A target that quantises its KV cache computes other states than the dense model does. What the head
makes of them must be equal all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.dense import DenseReference
from support.outputs import Tokens
from support.paths import HEAD, TARGET
from vllm_specformer.engine.proposer_v1 import SpecFormerProposer


class SeenStates(DenseReference):
    """Takes each token's hooked states from those seen, by the text up to it."""

    def __init__(self, head: Path = HEAD, target: Path = TARGET) -> None:
        super().__init__(head, target)
        self.seen: dict[Tokens, Tensor] = {}  # [G, H] each

    def see(self, text: Sequence[int], position: int, states: Sequence[Tensor]) -> None:
        """The hooked states of the token at `position` of `text`, G of [H]."""
        self.seen[tuple(text[: position + 1])] = torch.stack(list(states)).cpu()

    @torch.no_grad()
    def slot_states(
        self, text: Sequence[int], anchors: Sequence[int], num_tokens: int | None = None
    ) -> Tensor:
        where = torch.tensor([list(anchors)])
        seen = [self.seen[tuple(text[: i + 1])] for i in range(max(anchors) + 1)]
        states = torch.stack(seen, dim=1)[:, None]  # [G, 1, T, H]
        bonus = self.target.embed(torch.tensor(text)[where[0] + 1])
        wanted = num_tokens or self.head.config.num_draft_slots
        slots = self.head(tuple(states), where, bonus, self.head.slots_to_run(wanted))
        return self.target.norm(slots)[0]


@contextmanager
def seeing(reference: SeenStates) -> Iterator[None]:
    """Let a reference see what V1's proposer is given."""
    original = SpecFormerProposer.propose

    def propose(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions, common = kwargs["target_positions"], kwargs["common_attn_metadata"]
        last = kwargs["token_indices_to_sample"]
        starts = common.query_start_loc.tolist()
        hooks = self._hooks(kwargs["target_hidden_states"])
        for row, (start, end) in enumerate(pairwise(starts)):
            until = end if last is None else int(last[row]) + 1
            text = self.runner.input_batch.token_ids_cpu[row].tolist()
            for index in range(start, until):
                reference.see(text, int(positions[index]), [hook[index] for hook in hooks])
        return original(self, *args, **kwargs)

    SpecFormerProposer.propose = propose
    try:
        yield
    finally:
        SpecFormerProposer.propose = original
