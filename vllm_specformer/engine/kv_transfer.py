"""KV connectors that move the cache layer by layer move the head's layers, too.

vLLM's attention layers wait for a connector before they run and hand their pages over afterwards.
The head's layers are written by the draft step, so the step does it. Connectors that move whole
caches at a step's end need none of it: vLLM asks them after drafting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer import (
    get_kv_transfer_group,
    has_kv_transfer_group,
    is_v1_kv_transfer_group,
)

from vllm_specformer.engine.attention import DraftAttentionMetadata


def moving_pages(propose: Callable[..., Any]) -> Callable[..., Any]:
    """Let a connector, if there is one, load before a proposer's `propose` and save after it."""

    @functools.wraps(propose)
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        connector = _connector()
        if connector is None:
            return propose(self, *args, **kwargs)
        layers = self.model.attn.layers
        for layer in layers:
            connector.wait_for_layer_load(layer.layer_name)
        drafts = propose(self, *args, **kwargs)
        about = DraftAttentionMetadata(kwargs.get("common_attn_metadata"))
        for layer in layers:
            connector.save_kv_layer(layer.layer_name, layer.kv_cache, about)
        return drafts

    return moved


def _connector() -> Any:
    """The connector that takes part in this step; none in a dummy step."""
    if not has_kv_transfer_group() or not is_v1_kv_transfer_group():
        return None
    connector = get_kv_transfer_group()
    return connector if connector.has_connector_metadata() else None
