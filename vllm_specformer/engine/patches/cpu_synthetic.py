"""Synthetic acceptance on vLLM's CPU build, where its rejection kernels refuse it.

`rejection_sample_method: synthetic` accepts each draft with a given probability, whatever the
target says of it, so that drafting can be measured at a chosen acceptance length. vLLM's GPU
kernels and its V2 runner do that for every method; the CPU build's V1 kernels end the engine with
an assertion (0.32 and 0.33). The rule here is the GPU kernels'; without it nothing changes.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_GREEDY, _RANDOM = "_rejection_greedy_sample_kernel_impl", "_rejection_random_sample_kernel_impl"


def repair_synthetic(module: ModuleType) -> None:
    """Let both rejection kernels of `vllm.utils.cpu_triton_utils` accept synthetically."""
    if not (hasattr(module, _GREEDY) and hasattr(module, _RANDOM)):
        return
    greedy, random = getattr(module, _GREEDY), getattr(module, _RANDOM)
    if hasattr(greedy, "__wrapped__"):
        return

    @functools.wraps(greedy)
    def greedy_sample(
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
            greedy(*requests, bonus_token_ids, is_greedy, max_spec_len, uniform_probs)
            return
        assert uniform_probs is not None
        assert synthetic_conditional_rates is not None
        mine = torch.ones(len(output_token_ids), dtype=torch.bool)
        accept(
            *requests,
            bonus_token_ids,
            mine if is_greedy is None else is_greedy,
            uniform_probs,
            synthetic_conditional_rates,
        )

    @functools.wraps(random)
    def random_sample(
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
            random(
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

    names: dict[str, Any] = vars(module)
    names[_GREEDY], names[_RANDOM] = greedy_sample, random_sample


def accept(
    output: Tensor,
    sums: Tensor,
    drafts: Tensor,
    replacements: Tensor,
    bonus: Tensor,
    mine: Tensor,
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
        mine: bool [R].
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
