"""Greedy or drawn drafts: the default of an engine, and what is best for a single request.

A greedy request accepts a draft that is the target's most probable token, so the head's best token
is the best draft. A sampled request accepts a draft `x` with probability min(1, p(x) / q(x)) if it
was drawn from q, and p(x) if it was chosen: drawn drafts are accepted with the overlap of p and q,
chosen ones with the probability of a single token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GREEDY, DRAWN = "greedy", "probabilistic"  # vLLM's words in `draft_sample_method`
METHOD = "draft_sample_method"

# A request that keeps less than this share of the target's probability, or so few tokens, is better
# served by greedy drafts: too much of what the head's whole distribution gives lies outside.
# Measured on the bundled pair, docs/sampled-requests.md.
NARROW_TOP_P = 0.65
NARROW_TOP_K = 2


def default_method(speculative: Mapping[str, Any]) -> str:
    """vLLM's `draft_sample_method` for a speculative config in which the user may not have set it.

    Drawn drafts, which vLLM draws for sampled requests only. Under synthetic acceptance the target
    plays no part, so that nothing would be gained by drawing.
    """
    given: str | None = speculative.get(METHOD)
    if given is not None:
        return given  # vLLM judges it
    synthetic = speculative.get("rejection_sample_method") == "synthetic"
    return GREEDY if synthetic else DRAWN


def wants_best(params: Any) -> bool:
    """Whether a request's drafts must be, or had better be, the head's best tokens.

    A grammar cuts drafts off from the first that it forbids. Then whether a draft is verified hangs
    on its value, which vLLM's rule for drawn drafts does not allow for: the text would lose the
    target's distribution. Chosen drafts may be cut off anywhere. With few tokens to choose from (a
    small top-k or top-p) they are accepted more often than drawn ones.

    Args:
        params: vLLM's sampling parameters; None (a pooling request) has no drafts.
    """
    if params is None or params.temperature == 0:
        return False
    is_cut = params.structured_outputs is not None
    is_narrow = 1 <= params.top_k <= NARROW_TOP_K or params.top_p < NARROW_TOP_P
    return is_cut or is_narrow
