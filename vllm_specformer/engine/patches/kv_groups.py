"""The target's KV-cache groups stay what they are without the head, whose layers join one of them.

vLLM derives the groups from the numbers of layers of each kind, so layers that are added change
them even with equal specs: 12 full-attention and 6 windowed layers make 3 groups, 13 and 6 make 4,
and 4 with 24 Mamba layers make 7, 5 make 6. Each group costs the scheduler time in every step, and
prefill and decode instances must agree about them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_specformer.engine.patches.ledger import patch

_INFIX = ".specformer."


def head_layer_name(index: int) -> str:
    """Name of a layer of the head; vLLM wants one number in it, no other layer's."""
    return f"model.layers.{index}{_INFIX}attn"


def is_head_layer(name: str) -> bool:
    return _INFIX in name


@patch(
    "vllm.v1.core.kv_cache_utils:get_kv_cache_groups",
    later="vllm.v1.core.kv_cache_planning:get_kv_cache_groups",  # 0.33
    why="layers of a head would change how vLLM groups the target's KV caches: groups these alone "
    "and adds the head's layers to one group",
    guard="acts only where there are layers of a SpecFormer head",
)
def get_kv_cache_groups(
    original: Callable[..., Any], vllm_config: Any, kv_cache_spec: dict[str, Any]
) -> Any:
    heads = {name: spec for name, spec in kv_cache_spec.items() if is_head_layer(name)}
    target = {name: spec for name, spec in kv_cache_spec.items() if name not in heads}
    lent = next(iter(heads.values()), None)
    lenders = {name for name, spec in target.items() if spec == lent}
    if not lenders:  # no head, or one in a target of windowed layers that are kept whole
        return original(vllm_config, kv_cache_spec)
    groups = original(vllm_config, target)
    kv_cache_spec.update(target)  # the original may have changed specs in place
    joined = min(
        (group for group in groups if not lenders.isdisjoint(group.layer_names)),
        key=lambda group: len(group.layer_names),
    )
    return [_with(group, list(heads), lenders) if group is joined else group for group in groups]


def _with(group: Any, names: list[str], lenders: set[str]) -> Any:
    """A group with the head's layers at its end, where their pages follow each other."""
    spec = group.kv_cache_spec
    if hasattr(spec, "kv_cache_specs"):  # one spec for each layer
        lender = next(name for name in group.layer_names if name in lenders)
        own = dict.fromkeys(names, spec.kv_cache_specs[lender])
        spec = replace(spec, kv_cache_specs=spec.kv_cache_specs | own)
    return replace(group, layer_names=[*group.layer_names, *names], kv_cache_spec=spec)
