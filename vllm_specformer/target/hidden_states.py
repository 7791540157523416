"""Hooked hidden states of a Hugging Face target, numbered as vLLM numbers them.

Id 0 is the embedding output, id `i` the residual stream after layer `i`, id `L` the state after the
last layer BEFORE the final norm. Transformers' own `hidden_states[-1]` is taken after that norm; a
head trained on it and served by vLLM would be silently wrong, so the states are captured by hooks.
A scaled embedding (Gemma, Granite) is scaled in state 0, as vLLM hands it out, and unscaled in
`HookedTarget.embed`, as the engine looks it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from vllm_specformer.target.parts import LAYER_NAMES, NORM_NAMES, find_part


class HookedTarget:
    """A frozen target that returns hooked states and, on request, logits."""

    def __init__(self, target: PreTrainedModel, hook_ids: Sequence[int]) -> None:
        self.target = target.eval().requires_grad_(False)
        self.decoder = find_decoder(target)
        self.layers = find_part(self.decoder, LAYER_NAMES)
        self.norm = find_part(self.decoder, NORM_NAMES)
        self.hook_ids = tuple(hook_ids)
        self._softcap, self._scale = logit_changes(target.config)
        self._states: dict[int, Tensor] = {}
        self._output: Callable[[Tensor], Tensor] = target.get_output_embeddings()
        self._kept_rows: tuple[Tensor, Tensor | None] | None = None
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

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the target's embedding table for int64 tokens [...]: [..., H].

        Without the scale that some families multiply them by: vLLM applies it in one place or
        another, and the head's norm takes it out again.
        """
        return F.embedding(tokens, self.target.get_input_embeddings().weight)

    def logits(self, states: Tensor) -> Tensor:
        """Slot states [..., H] -> logits [..., V], through the target's final norm and lm_head."""
        return self.lm_head(self.norm(states))

    def score_only(self, token_ids: Tensor) -> None:
        """From now on give logits of these tokens alone, int64 [N]; copies their lm_head rows."""
        self._kept_rows = weight, bias = _rows(*self._own_rows(), token_ids)
        self._output = partial(F.linear, weight=weight, bias=bias)

    def _own_rows(self) -> tuple[Tensor, Tensor | None]:
        full = self.target.get_output_embeddings()
        return full.weight, full.bias

    def lm_head(self, normed: Tensor) -> Tensor:
        """States behind the final norm [..., H] -> logits [..., V], with the family's changes."""
        return self._changed(self._output(normed))

    def lm_head_of(self, indices: Tensor) -> Callable[[Tensor], Tensor]:
        """`lm_head` of some of the tokens that it scores, int64 [S]; copies their rows."""
        weight, bias = _rows(*(self._kept_rows or self._own_rows()), indices)
        return lambda normed: self._changed(F.linear(normed, weight, bias))

    def _changed(self, logits: Tensor) -> Tensor:
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits if self._scale == 1 else logits * self._scale


def _rows(weight: Tensor, bias: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor | None]:
    indices = indices.to(weight.device)
    return weight[indices], None if bias is None else bias[indices]


def find_decoder(target: PreTrainedModel) -> nn.Module:
    """The stack of layers between embedding and lm_head; some classes hand out themselves."""
    decoder = target.get_decoder()
    return decoder.model if decoder is target else decoder


def logit_changes(config: PreTrainedConfig) -> tuple[float, float]:
    """What a family does to its logits: the cap (0: none), and the factor applied after it.

    The fields and the order are those of vLLM's `LogitsProcessor` calls; `target.check_parts` holds
    the outcome against the model's own.
    """
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    return getattr(text, "final_logit_softcapping", None) or 0.0, scale
