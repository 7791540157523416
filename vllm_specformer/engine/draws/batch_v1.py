"""Drawn drafts on the V1 runner, beside requests that get the head's best tokens.

One number per draft decides: the token at that share of the head's distribution. vLLM draws an
exponential number for every token of the vocabulary, which takes a CPU longer than the rest of a
draft step, and from one stream for the whole batch, which has no seed. Here a request with a seed
has a stream of its own for its drafts, beside the one that the target's tokens are drawn from: it
repeats itself, whatever else is in the batch. Rows that take the best token are verified as such,
by a distribution that knows nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from vllm_specformer.engine.draws.rules import wants_best

# Added to a request's seed for the stream of its drafts, which must not be the target's noise.
_SALT = 0x5DEECE66D
_STREAM = "specformer_draft_stream"


class DrawnBatch:
    """What a batch of R requests with n slots each is to get.

    Attributes:
        num_drawn: requests whose drafts are drawn.
        best: rows of sampled requests that get the head's best tokens.
        streams: row -> stream of a request with a seed whose drafts are drawn.
    """

    def __init__(self, runner: Any, temperature: Tensor, num_slots: int) -> None:
        """The first R requests of the V1 runner's batch; temperature float [R], 0 for greedy."""
        num_reqs = len(temperature)
        self.num_drawn = 0
        self.best: list[int] = []
        self.streams: dict[int, Generator] = {}
        self._shape = num_reqs, num_slots
        self._temperature = torch.where(temperature > 0, temperature, 1.0)
        self._greedy: list[int] = []
        self._shares: Tensor | None = None
        discarded = runner.discard_request_mask.np
        for row, name in enumerate(runner.input_batch.req_ids[:num_reqs]):
            state = runner.requests[name]
            if wants_best(state.sampling_params):
                self.best.append(row)
            elif state.sampling_params.temperature == 0:
                self._greedy.append(row)
            else:
                self.num_drawn += 1
                # Drafts of a prompt that is not yet computed to its end are never verified. They
                # take nothing from the stream: the parts of a prompt make no difference.
                if state.generator is not None and not discarded[row]:
                    self.streams[row] = _stream(state)

    def draw(self, logits: Tensor, slot: int = 0) -> tuple[Tensor, Tensor]:
        """Choose a token in every row.

        Args:
            logits: float32 [R * m, N], the m slots of a request after one another.
            slot: the first of these slots.

        Returns:
            Indices int64 [R * m], and what they were drawn from, float32 [R * m, N]: certain ones
            in the rows of `best`. In those of greedy requests vLLM does not read it.
        """
        requests = self._shape[0]
        of_request = logits.view(requests, -1, logits.shape[-1])
        slots = of_request.shape[1]
        probs = (of_request / self._temperature[:, None, None]).softmax(-1)
        reached = probs.cumsum(-1, dtype=torch.float64)
        total = reached[..., -1:]
        # The largest share is below 1, but its product with the total may round to the total.
        at = (self._own_shares(logits)[:, slot : slot + slots, None] * total).minimum(
            torch.nextafter(total, torch.zeros_like(total))
        )
        chosen = torch.searchsorted(reached, at, right=True).squeeze(-1)
        for rows, is_certain in ((self._greedy, False), (self.best, True)):
            if rows:
                index = torch.tensor(rows, device=logits.device)
                best = of_request[index].argmax(-1)
                chosen[index] = best
                if is_certain:
                    certain = torch.zeros_like(of_request[index]).scatter_(-1, best[..., None], 1.0)
                    probs[index] = certain
        return chosen.flatten(), probs.flatten(0, 1)

    def _own_shares(self, logits: Tensor) -> Tensor:
        """A number from 0 to below 1 for every slot of the step, float64 [R, n]."""
        if self._shares is None:
            device, kind = logits.device, torch.float64
            self._shares = torch.rand(self._shape, dtype=kind, device=device)
            for row, stream in self.streams.items():
                own = torch.rand(self._shape[1], generator=stream, dtype=kind, device=device)
                self._shares[row] = own
        return self._shares


def _stream(state: Any) -> Generator:
    """The stream of a request's drafts, kept with what the runner knows of the request."""
    stream: Generator | None = vars(state).get(_STREAM)
    if stream is None:
        stream = Generator(device=state.generator.device)
        stream.manual_seed((state.sampling_params.seed + _SALT) % 2**63)
        vars(state)[_STREAM] = stream
    return stream
