"""FlashAttention for targets whose drafts are trees; load it where FlashAttention is there."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from vllm_specformer.engine.candidates.attention import TreeAttention


class TreeFlashAttentionImpl(TreeAttention, FlashAttentionImpl):
    """Built in FlashAttention's place; its cache, metadata and graphs stay the backend's own."""
