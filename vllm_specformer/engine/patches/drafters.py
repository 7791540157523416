"""Classes of vLLM in whose place ours are built: the drafters of both runners, and V2's sampler.

The functions below take what the class's constructor takes, under the same names, because callers
may give any of it by keyword; their defaults let a faulty call reach the constructor's own error.
"""

from __future__ import annotations

from typing import Any

from vllm_specformer.engine.patches.ledger import construct
from vllm_specformer.engine.speculative_config import (
    drafts_with_head,
    tree_settings,
    verifies_coupled,
)


@construct(
    "vllm.v1.spec_decode.dflash:DFlashProposer",
    "vllm_specformer.engine.proposer_v1:SpecFormerProposer",
    why="vLLM has no hook that hands a custom proposer the hidden states: builds our subclass "
    "instead (V1 runner)",
    guard="acts only when the draft architecture is SpecFormerDraftModel",
    bases=("SpecDecodeBaseProposer",),
)
def drafts_on_v1(vllm_config: Any = None, *_: Any, **__: Any) -> bool:
    return drafts_with_head(getattr(vllm_config, "speculative_config", None))


@construct(
    "vllm.v1.worker.gpu.spec_decode.dflash.speculator:DFlashSpeculator",
    "vllm_specformer.engine.speculator_v2:SpecFormerSpeculator",
    why="the same on the V2 runner: builds our subclass instead, or the one that drafts trees",
    guard="acts only when the draft architecture is SpecFormerDraftModel",
    bases=("DraftModelSpeculator",),
)
def drafts_on_v2(vllm_config: Any = None, *_: Any, **__: Any) -> bool | str:
    speculative = getattr(vllm_config, "speculative_config", None)
    if tree_settings(speculative) is not None:
        return "vllm_specformer.engine.candidates.speculator:CandidateSpeculator"
    return drafts_with_head(speculative)


@construct(
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler",
    "vllm_specformer.engine.coupled:CoupledSampler",
    why="vLLM has no way to choose another verification, and verifies chains only: builds our "
    "sampler, or the one that walks down trees (V2 runner)",
    guard='acts only on "verification": "coupled" or "tree_nodes" in a SpecFormer speculative '
    "config",
)
def verifies_on_v2(sampler: Any = None, spec_config: Any = None, *_: Any, **__: Any) -> bool | str:
    if tree_settings(spec_config) is not None:
        return "vllm_specformer.engine.candidates.sampler:CandidateSampler"
    return verifies_coupled(spec_config)
