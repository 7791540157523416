"""Two request features that come out wrong in vLLM 0.32 and 0.33 with any speculative method.

`min_tokens` on the V1 runner: the token after the last draft is sampled as if none of the drafts
before it counted, so it may not end the text although the minimum is reached by then. Output then
differs from that without speculation; here it does not.

`logprob_token_ids`, log-probabilities of tokens the request names: on the V1 runner such a request
ends the engine when another one in the batch asks for log-probabilities, and gets none otherwise;
on V2 the rows after the first name other tokens. It is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_specformer.engine.patches.ledger import patch
from vllm_specformer.engine.speculative_config import drafts_with_head

if TYPE_CHECKING:
    from torch import Tensor


@patch(
    "vllm.v1.sample.sampler:Sampler.apply_logits_processors",
    why="min_tokens forbids the end of a text one token too long where drafts reach the minimum, "
    "with any speculation on the V1 runner",
    guard="acts on bonus tokens of requests whose drafts reach min_tokens",
)
def apply_logits_processors(
    original: Callable[..., Tensor],
    self: Any,
    logits: Tensor,
    sampling_metadata: Any,
    predict_bonus_token: bool,
) -> Tensor:
    if not predict_bonus_token:
        return original(self, logits, sampling_metadata, predict_bonus_token)
    drafts = sampling_metadata.spec_token_ids or ()
    with _minimum_reached(sampling_metadata.logitsprocs.non_argmax_invariant, drafts):
        return original(self, logits, sampling_metadata, predict_bonus_token)


@contextmanager
def _minimum_reached(processors: Any, drafts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let the minimum's processors leave alone the rows [R] whose drafts bring them to it."""
    changed = []
    for processor in processors:
        reached = {
            row: list(entry[2])
            for row, entry in getattr(processor, "min_toks", {}).items()
            if row < len(drafts) and len(entry[1]) + len(drafts[row]) >= entry[0]
        }
        if reached:
            processor.apply = functools.partial(_apply_elsewhere, processor.apply, reached)
            changed.append(processor)
    try:
        yield
    finally:
        for processor in changed:
            del processor.apply  # the instance's; the class's shows again


def _apply_elsewhere(apply: Any, rows: dict[int, list[int]], logits: Tensor) -> Tensor:
    """`apply(logits)`, but the given tokens of the given rows keep their logits."""
    kept = {row: logits[row, tokens] for row, tokens in rows.items()}
    logits = apply(logits)
    for row, values in kept.items():
        logits[row, rows[row]] = values
    return logits


@patch(
    "vllm.sampling_params:SamplingParams._validate_spec_decode",
    why="logprob_token_ids ends the engine or returns other tokens' log-probabilities with any "
    "speculation: refuses it by name",
    guard="acts only when the draft architecture is SpecFormerDraftModel",
)
def _validate_spec_decode(
    original: Callable[..., None], self: Any, speculative_config: Any
) -> None:
    original(self, speculative_config)
    if self.logprob_token_ids is not None and drafts_with_head(speculative_config):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"logprob_token_ids={self.logprob_token_ids} cannot be combined with speculative "
            "decoding in this vLLM, which would return other tokens' log-probabilities or stop "
            "the engine; ask for logprobs, or serve without speculation",
            parameter="logprob_token_ids",
            value=self.logprob_token_ids,
        )
