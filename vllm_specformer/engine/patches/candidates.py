"""Trees of candidates in vLLM's V2 runner: where they are laid out, walked and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import construct, patch
from vllm_specformer.engine.speculative_config import tree_settings

_GUARD = 'acts only on "tree_nodes" in a SpecFormer speculative config'


@construct(
    "vllm.v1.worker.gpu.spec_decode.dflash.speculator:DFlashSpeculator",
    "vllm_specformer.engine.candidates.speculator:CandidateSpeculator",
    why="builds the speculator that drafts trees",
    guard=_GUARD,
    bases=("DraftModelSpeculator",),
)
def drafts_trees(vllm_config: Any = None, *_: Any, **__: Any) -> bool:
    return tree_settings(getattr(vllm_config, "speculative_config", None)) is not None


@construct(
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler",
    "vllm_specformer.engine.candidates.sampler:CandidateSampler",
    why="vLLM verifies chains only: builds our sampler, which walks down trees",
    guard=_GUARD,
)
def walks_trees(sampler: Any = None, spec_config: Any = None, *_: Any, **__: Any) -> bool:
    return tree_settings(spec_config) is not None


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
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
    why="a state row's tree dies with its tenant: the scheduler may give a new request rows of "
    "placeholders at once",
    guard=_GUARD,
)
def add_requests(original: Callable[..., None], self: Any, scheduler_output: Any) -> None:
    original(self, scheduler_output)
    trees = getattr(self.speculator, "trees", None)
    if trees is None:
        return
    # Also those that packages bring along, which no configuration names.
    processors = any(
        not type(processor).__module__.startswith("vllm.v1.worker.gpu.sample.")
        for processor in self.sampler.logits_processors
    )
    for request in scheduler_output.scheduled_new_reqs:
        state = self.req_states.req_id_to_index[request.req_id]
        trees.admit(state, processors or depends_on_rows_before(request.sampling_params))


def depends_on_rows_before(params: Any) -> bool:
    """Whether a row's logits are changed by the tokens of the rows before it.

    vLLM takes all rows of the request up to a row for its history, which they are in a chain only.
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
