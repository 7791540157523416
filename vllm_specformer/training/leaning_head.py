"""The head while it trains: a Markov term whose tables lean on the target's own.

The term looks one token up in a table `U` and scores all tokens by a table `V`. A training meets
most tokens of a vocabulary a few times or never, and their rows stay as they began. The target has
two such tables already, its embedding `E` and its lm_head `W`. So here the rows are `U + norm(E) A`
and `V + c W B` with two small matrices A and B: what is learnt of one token serves its neighbours.
The head that is saved has the sums as its tables; nothing of this is left when it is served.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.target.ends import TargetEnds
from vllm_specformer.training.packed_head import PackedHead

# Slows down B, whose every step moves the logits of all tokens.
_SCALE = 0.1
_ROWS = 4096  # tokens at a time


class LeaningHead(PackedHead):
    """A `PackedHead` with the matrices A, `markov_in`, and B, `markov_out`.

    For targets whose logits are linear in their states behind the norm (`TargetEnds.is_linear`).
    """

    def __init__(self, config: SpecFormerConfig) -> None:
        super().__init__(config)
        size, rank = config.hidden_size, config.markov_rank
        self.markov_in = nn.Linear(size, rank, bias=False)
        self.markov_out = nn.Linear(rank, size, bias=False)
        nn.init.normal_(self.markov_in.weight, std=0.02)
        nn.init.zeros_(self.markov_out.weight)

    def merged(self, target: TargetEnds) -> PackedHead:
        """The head as it is measured and saved; it shares all weights but the two tables."""
        with torch.device("meta"):
            plain = PackedHead(self.config)
        weights = self.state_dict()
        for name in ("markov_in.weight", "markov_out.weight"):
            del weights[name]
        with torch.no_grad():
            weights["markov_embed.weight"] = torch.cat(list(self._embed_rows(target)))
            rows = target.project(self.markov_out.weight.T).T
            weights["markov_lm_head.weight"] = self.markov_lm_head.weight + _SCALE * rows
        plain.load_state_dict(weights, assign=True)
        return plain.eval()

    def _embed_rows(self, target: TargetEnds) -> Iterator[Tensor]:
        every = torch.arange(self.config.vocab_size, device=self.markov_embed.weight.device)
        for tokens in every.split(_ROWS):
            yield self.earlier(tokens, target)

    def earlier(self, tokens: Tensor, target: TargetEnds) -> Tensor:
        embedded = target.embed(tokens).to(self.markov_in.weight.dtype)
        normed = F.rms_norm(embedded, embedded.shape[-1:], eps=self.config.rms_norm_eps)
        return self.markov_embed(tokens) + self.markov_in(normed)

    def moved(self, normed: Tensor, earlier: Tensor) -> Tensor:
        """So one pass over the lm_head serves the state and its term, as it is linear."""
        return normed + _SCALE * self.markov_out(earlier)

    def markov_parameters(self) -> list[Tensor]:
        return [*super().markov_parameters(), self.markov_in.weight, self.markov_out.weight]
