"""Drawn drafts on the V1 runner, beside requests that get the head's best tokens.

vLLM draws all rows of a batch from one stream, which has no seed. Here a request with a seed has a
stream of its own for its drafts, beside the one that the target's tokens are drawn from: it repeats
itself, whatever else is in the batch. Rows that take the best token are verified as such, by a
distribution that knows nothing else.
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

    def __init__(self, runner: Any, num_reqs: int, num_slots: int) -> None:
        """The first `num_reqs` requests of the V1 runner's batch."""
        self.num_drawn = 0
        self.best: list[int] = []
        self.streams: dict[int, Generator] = {}
        self._shape = num_reqs, num_slots
        self._noise: Tensor | None = None
        discarded = runner.discard_request_mask.np
        for row, name in enumerate(runner.input_batch.req_ids[:num_reqs]):
            state = runner.requests[name]
            if wants_best(state.sampling_params):
                self.best.append(row)
            elif state.sampling_params.temperature > 0:
                self.num_drawn += 1
                # Drafts of a prompt that is not yet computed to its end are never verified. They
                # take nothing from the stream: the parts of a prompt make no difference.
                if state.generator is not None and not discarded[row]:
                    self.streams[row] = _stream(state)

    def apply(self, tokens: Tensor, probs: Tensor, slot: int = 0) -> Tensor:
        """Draw again for rows with a stream of their own, and give the best token to others.

        Args:
            tokens: drawn for every row, int64 [R * m], the m slots of a request after one another;
                changed in place.
            probs: what they were drawn from, float32 [R * m, N]. Rows that get the best token are
                changed in place: it has probability 1.
            slot: the first of these slots. Those of a step are asked for once and in order.

        Returns:
            `tokens`.
        """
        slots = len(tokens) // self._shape[0]
        chosen, of_request = tokens.view(-1, slots), probs.view(self._shape[0], slots, -1)
        if self.streams:
            rows = torch.tensor(list(self.streams), device=probs.device)
            noise = self._own_noise(probs)[:, slot : slot + slots]
            chosen[rows] = (of_request[rows] / noise).argmax(-1)
        if self.best:
            rows = torch.tensor(self.best, device=probs.device)
            best = of_request[rows].argmax(-1)
            of_request[rows] = torch.zeros_like(of_request[rows]).scatter_(-1, best[..., None], 1.0)
            chosen[rows] = best
        return tokens

    def _own_noise(self, probs: Tensor) -> Tensor:
        """Of every row with a stream, for all slots of the step, [rows, n, N]."""
        if self._noise is None:
            shape = len(self.streams), self._shape[1], probs.shape[-1]
            self._noise = torch.empty(shape, dtype=probs.dtype, device=probs.device)
            for noise, stream in zip(self._noise, self.streams.values(), strict=True):
                noise.exponential_(generator=stream)
            self._noise.clamp_min_(_TINY)
        return self._noise


# What a token of probability 0 must not be divided by: 0/0 would be the largest of all.
_TINY = torch.finfo(torch.float32).tiny


def _stream(state: Any) -> Generator:
    """The stream of a request's drafts, kept with what the runner knows of the request."""
    stream: Generator | None = vars(state).get(_STREAM)
    if stream is None:
        stream = Generator(device=state.generator.device)
        stream.manual_seed((state.sampling_params.seed + _SALT) % 2**63)
        vars(state)[_STREAM] = stream
    return stream
