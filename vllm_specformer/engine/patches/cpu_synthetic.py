"""Synthetic acceptance on vLLM's CPU build, where its rejection kernels refuse it.

`rejection_sample_method: synthetic` accepts each draft with a given probability, whatever the
target says of it, so that drafting can be measured at a chosen acceptance length. vLLM's GPU
kernels and its V2 runner do that for every method; the CPU build's V1 kernels end the engine with
an assertion (0.32 and 0.33). The rule here is the GPU kernels'; without it nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vllm_specformer.engine.patches.ledger import patch

if TYPE_CHECKING:
    from torch import Tensor

_WHY = "rejection_sample_method 'synthetic' ends the engine on the CPU build, with any speculation"
_GUARD = "the CPU build alone imports that module; acts on synthetic acceptance only"


@patch(
    "vllm.utils.cpu_triton_utils:_rejection_greedy_sample_kernel_impl",
    why=f"{_WHY} (greedy requests)",
    guard=_GUARD,
)
def _rejection_greedy_sample_kernel_impl(
    original: Callable[..., None],
    output_token_ids: Tensor,
    cu_num_draft_tokens: Tensor,
    draft_token_ids: Tensor,
    target_argmax: Tensor,
    bonus_token_ids: Tensor,
    is_greedy: Tensor | None,
    max_spec_len: int,
    uniform_probs: Tensor | None = None,
    synthetic_conditional_rates: Tensor | None = None,
    SYNTHETIC_MODE: bool = False,  # noqa: N803
) -> None:
    requests = (output_token_ids, cu_num_draft_tokens, draft_token_ids, target_argmax)
    if not SYNTHETIC_MODE:
        original(*requests, bonus_token_ids, is_greedy, max_spec_len, uniform_probs)
        return
    assert uniform_probs is not None
    assert synthetic_conditional_rates is not None
    accept(
        *requests,
        bonus_token_ids,
        [True] * len(output_token_ids) if is_greedy is None else is_greedy,
        uniform_probs,
        synthetic_conditional_rates,
    )


@patch(
    "vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl",
    why=f"{_WHY} (sampled requests)",
    guard=_GUARD,
)
def _rejection_random_sample_kernel_impl(
    original: Callable[..., None],
    output_token_ids: Tensor,
    cu_num_draft_tokens: Tensor,
    draft_token_ids: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    bonus_token_ids: Tensor,
    recovered_token_ids: Tensor,
    uniform_probs: Tensor,
    is_greedy: Tensor,
    max_spec_len: int,
    vocab_size: int,
    synthetic_conditional_rates: Tensor | None = None,
    NO_DRAFT_PROBS: bool = False,  # noqa: N803
    SYNTHETIC_MODE: bool = False,  # noqa: N803
) -> None:
    requests = (output_token_ids, cu_num_draft_tokens, draft_token_ids)
    if not SYNTHETIC_MODE:
        original(
            *requests,
            draft_probs,
            target_probs,
            bonus_token_ids,
            recovered_token_ids,
            uniform_probs,
            is_greedy,
            max_spec_len,
            vocab_size,
            NO_DRAFT_PROBS=NO_DRAFT_PROBS,
        )
        return
    assert synthetic_conditional_rates is not None
    accept(
        *requests,
        recovered_token_ids,
        bonus_token_ids,
        ~is_greedy.bool(),
        uniform_probs,
        synthetic_conditional_rates,
    )


def accept(
    output: Tensor,
    sums: Tensor,
    drafts: Tensor,
    replacements: Tensor,
    bonus: Tensor,
    mine: Tensor | Sequence[bool],
    uniform: Tensor,
    rates: Tensor,
) -> None:
    """Accept request by request while the numbers fall below the rates, then add one token.

    Args:
        output: [R, K + 1], filled in place for the requests that are `mine`.
        sums: running sums of drafts per request [R].
        drafts: token ids [N]; -1 is a placeholder, never accepted.
        replacements: tokens [N] to emit where a draft is not accepted.
        bonus: tokens [R, 1] to emit after all drafts of a request.
        mine: bool [R], a tensor or a list.
        uniform: numbers from 0 to 1, [N].
        rates: chances of each place in a draft, given that all before it were accepted, [K].
    """
    start = 0
    for request, end in enumerate(sums.tolist()):
        if mine[request]:
            own, length = slice(start, end), end - start
            accepted = (uniform[own] < rates[:length]) & (drafts[own] >= 0)
            kept = int(accepted.long().cumprod(0).sum())
            output[request, :kept] = drafts[start : start + kept]
            last = bonus[request, 0] if kept == length else replacements[start + kept]
            output[request, kept] = last
        start = end
