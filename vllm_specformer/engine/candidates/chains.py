"""Requests that get a chain where others get trees.

vLLM takes all rows of a request up to a row for its history, which they are in a chain only. That
matters where a row's logits are changed by the tokens of the rows before it.
"""

from __future__ import annotations

from typing import Any

_BUILT_IN = "vllm.v1.worker.gpu.sample."


def depends_on_rows_before(params: Any) -> bool:
    """Whether vLLM changes a request's logits by the tokens before a row.

    Args:
        params: vLLM's sampling parameters; None (a pooling request) has no drafts.
    """
    if params is None:
        return False
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    return (
        penalties != (0.0, 0.0, 1.0)
        or bool(params.bad_words)
        or params.structured_outputs is not None
        or params.thinking_token_budget is not None
    )


def has_other_processors(sampler: Any) -> bool:
    """Whether logits processors other than vLLM's own take part, which may look at any row.

    Also those that packages bring along, which no configuration names.
    """
    return any(
        not type(processor).__module__.startswith(_BUILT_IN)
        for processor in sampler.logits_processors
    )
