"""Target and head in plain PyTorch: the reference for what an engine drafts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from support.paths import HEAD, TARGET
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target


class DenseReference:
    """Target and head in plain PyTorch, fp32: what the engine's drafts must be."""

    def __init__(self, head: Path = HEAD, target: Path = TARGET) -> None:
        model = load_target(target, torch.float32, torch.device("cpu"))
        self.head = SpecFormerHead.from_pretrained(head, dtype=torch.float32).eval()
        self.target = HookedTarget(model, self.head.config.aux_hidden_state_layer_ids)

    @torch.no_grad()
    def states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The hooked states of tokens int64 [1, T]: G x [1, T, H]."""
        return self.target(ids)[0]

    @torch.no_grad()
    def slot_states(
        self, text: Sequence[int], anchors: Sequence[int], num_tokens: int | None = None
    ) -> torch.Tensor:
        """The slots at the given positions of `text`, behind the final norm: [anchors, K, H].

        With `num_tokens` as a pass that drafts so many, which may open fewer slots.
        """
        wanted = num_tokens or self.head.config.num_draft_slots
        ids = torch.tensor([list(text)])
        where = torch.tensor([list(anchors)])
        states = self.states(ids)
        bonus = self.target.embed(ids[0, where + 1])
        slots = self.head(states, where, bonus, self.head.slots_to_run(wanted))
        return self.target.norm(slots)[0]

    @torch.no_grad()
    def biased(self, slots: torch.Tensor, slot: int, previous: int) -> torch.Tensor:
        """Logits [V] of one of an anchor's slots [K, H] after a token; -inf: not scored."""
        logits = self.head.scored(self.target.lm_head(slots[slot]))
        if self.head.config.markov_rank:
            gates = self.head.markov_gates(slots)
            gate = None if gates is None else gates[slot]
            logits = logits + self.head.markov_logits(torch.tensor(previous), gate)
        return self.head.over_vocabulary(logits[None], float("-inf"))[0]
