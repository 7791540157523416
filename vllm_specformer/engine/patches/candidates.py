"""Trees of candidates in vLLM's V2 runner: where they are laid out, walked and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import construct, patch
from vllm_specformer.engine.speculative_config import tree_settings

_GUARD = 'acts only on "tree_nodes" in a SpecFormer speculative config'


@construct(
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl",
    "vllm_specformer.engine.candidates.flash_attention:TreeFlashAttentionImpl",
    why="vLLM's attention is causal among the rows of a request: builds our subclass, in which a "
    "row of a tree sees its ancestors alone",
    guard=_GUARD,
)
def attends_to_trees(*_: Any, **__: Any) -> bool:
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return tree_settings(getattr(config, "speculative_config", None)) is not None


@patch(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn",
    why="a tree's rows stand at the root's position plus their depth, known once the slots of the "
    "rows have been looked up",
    guard=_GUARD,
)
def prepare_attn(original: Callable[..., Any], self: Any, input_batch: Any) -> Any:
    prepared = original(self, input_batch)
    trees = getattr(self.speculator, "trees", None)
    if trees is not None:
        sampler = self.rejection_sampler
        if not hasattr(sampler, "walks_trees"):
            raise TypeError(f"{type(sampler).__name__} verifies chains only, trees are drafted")
        sampler.trees = trees
        trees.place(input_batch)
    return prepared


@patch(
    "vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting",
    why="vLLM 0.32 keeps a row of every step's budget free per node, for drafters that write K "
    "and V at drafted positions; the head writes none there",
    guard=_GUARD,
    attribute=True,
)
def max_num_new_slots_for_drafting(original: Callable[..., int], self: Any) -> int:
    return original(self) if tree_settings(self) is None else 0


@patch(
    "vllm.config.vllm:VllmConfig.num_lookahead_tokens",
    why="vLLM keeps pages for a token per node past those it verifies, which the head does not use",
    guard=_GUARD,
    attribute=True,
)
def num_lookahead_tokens(original: Callable[..., int], self: Any) -> int:
    return original(self) if tree_settings(self.speculative_config) is None else 0
