"""What a file of hidden states says of itself, for who writes it inside vLLM and who reads it."""

from __future__ import annotations

from collections.abc import Iterable

# In the metadata: which states they are, in vLLM's numbering, as `joined` writes them.
LAYER_IDS = "aux_hidden_state_layer_ids"


def joined(ids: Iterable[int]) -> str:
    """As in 0,2,5."""
    return ",".join(map(str, ids))
