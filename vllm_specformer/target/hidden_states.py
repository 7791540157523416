"""Hooked hidden states of a Hugging Face target, numbered as vLLM numbers them.

Id 0 is the embedding output, id `i` the residual stream after layer `i`, id `L` the state after the
last layer BEFORE the final norm. Transformers' own `hidden_states[-1]` is taken after that norm; a
head trained on it and served by vLLM would be silently wrong, so the states are captured by hooks.
A scaled embedding (Gemma, Granite) is scaled in state 0, as vLLM hands it out, and unscaled in
`TargetEnds.embed`, as the engine looks it up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from vllm_specformer.target.ends import TargetEnds
from vllm_specformer.target.parts import LAYER_NAMES, find_part


class HookedTarget(TargetEnds):
    """A frozen target that returns hooked states and, on request, logits."""

    def __init__(self, target: PreTrainedModel, hook_ids: Sequence[int]) -> None:
        super().__init__(target, hook_ids)
        self.layers = find_part(self.decoder, LAYER_NAMES)
        self._states: dict[int, Tensor] = {}
        for layer_id, layer in enumerate(self.layers):
            if layer_id in self.hook_ids:
                layer.register_forward_pre_hook(self._keep_input(layer_id), with_kwargs=True)
        if len(self.layers) in self.hook_ids:
            last = len(self.layers)
            self.norm.register_forward_pre_hook(self._keep_input(last), with_kwargs=True)

    def _keep_input(self, hook_id: int):  # type: ignore[no-untyped-def]
        def hook(module, args, kwargs):  # type: ignore[no-untyped-def]
            self._states[hook_id] = args[0] if args else kwargs["hidden_states"]

        return hook

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, position_ids: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """int64 [batch, T] -> hooked states G x [batch, T, H], normed last states [batch, T, H].

        Where `position_ids` [batch, T] restart, another text begins: Transformers then confines
        attention to each text, in every family whose masks it makes itself (see `target.py`).
        """
        last = self.decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return [self._states.pop(i) for i in self.hook_ids], last

    @torch.no_grad()
    def extend(
        self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache
    ) -> tuple[list[Tensor], Tensor]:
        """The same for tokens that follow those in a cache of Transformers, which takes them up.

        int64 [batch, n] behind [batch, T - n]; `mask` int64 [batch, T], 0 where there is padding.
        """
        last = self.decoder(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return [self._states.pop(i) for i in self.hook_ids], last

    def forget(self) -> None:
        """Drop the states of a run that failed halfway."""
        self._states.clear()
