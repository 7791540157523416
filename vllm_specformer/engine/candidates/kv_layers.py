"""The target's layers as accepted paths move through them: in groups that one launch serves."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from specformer_kernels.kv_compact import cache_addresses, kv_compact
from torch import Tensor

from vllm_specformer.engine.head_pages import target_layers


@dataclass(frozen=True)
class AlikeLayers:
    """Layers whose caches have one shape and whose slots are the same."""

    name: str  # of the first one
    caches: tuple[Tensor, ...]
    addresses: Tensor
    impl: Any  # of the first one's attention
    group: int  # their KV-cache group

    def move(self, source_slots: Tensor, target_slots: Tensor) -> None:
        kv_compact(self.caches, source_slots, target_slots, self.addresses)


class TargetLayers:
    """All layers of the target that keep K and V, found anew when vLLM binds other caches."""

    def __init__(self, vllm_config: Any, groups: Any) -> None:
        context = vllm_config.compilation_config.static_forward_context
        ours = {id(layer) for layer in target_layers(vllm_config)}
        self._layers = {name: layer for name, layer in context.items() if id(layer) in ours}
        self._group_of = {
            name: number for number, group in enumerate(groups) for name in group.layer_names
        }
        self._bound: list[Tensor] = []
        self._alike: list[AlikeLayers] = []

    def alike(self) -> list[AlikeLayers]:
        """The layers in as few groups as their slots and shapes allow."""
        bound = [layer.kv_cache for layer in self._layers.values()]
        same = len(bound) == len(self._bound) and all(map(operator.is_, bound, self._bound))
        if not same:
            self._bound, self._alike = bound, self._grouped()
        return self._alike

    def _grouped(self) -> list[AlikeLayers]:
        found: dict[Any, list[str]] = {}
        for name, layer in self._layers.items():
            cache = layer.kv_cache
            key = (self._group_of[name], cache.shape, cache.stride(), cache.dtype)
            found.setdefault(key, []).append(name)
        alike = []
        for names in found.values():
            caches = tuple(self._layers[name].kv_cache for name in names)
            first = names[0]
            impl, group = self._layers[first].impl, self._group_of[first]
            alike.append(AlikeLayers(first, caches, cache_addresses(caches), impl, group))
        return alike
