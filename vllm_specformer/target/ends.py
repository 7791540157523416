"""What of a frozen target a head works with: its embedding, final norm and lm_head.

A scaled embedding (Gemma, Granite) is unscaled here, as the engine looks it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vllm_specformer.target.parts import NORM_NAMES, find_part


class TargetEnds:
    """A frozen target that looks up embeddings and gives logits of states.

    Attributes:
        hook_ids: the hidden states that a head is given, in vLLM's numbering.
    """

    def __init__(self, target: PreTrainedModel, hook_ids: Sequence[int]) -> None:
        self.target = target.eval().requires_grad_(False)
        self.decoder = find_decoder(target)
        self.norm = find_part(self.decoder, NORM_NAMES)
        self.hook_ids = tuple(hook_ids)
        self._softcap, self._scale = logit_changes(target.config)
        self._output: Callable[[Tensor], Tensor] = target.get_output_embeddings()
        self._kept_rows: tuple[Tensor, Tensor | None] | None = None

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    def forget(self) -> None:
        """Drop what a run left behind, if this target can run."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the target's embedding table for int64 tokens [...]: [..., H].

        Without the scale that some families multiply them by: vLLM applies it in one place or
        another, and the head's norm takes it out again.
        """
        return F.embedding(tokens, self.target.get_input_embeddings().weight)

    def logits(self, states: Tensor) -> Tensor:
        """Slot states [..., H] -> logits [..., V], through the target's final norm and lm_head."""
        return self.lm_head(self.norm(states))

    @property
    def is_linear(self) -> bool:
        """Whether logits are linear in states behind the norm (not so where they are capped)."""
        return not self._softcap

    def project(self, vectors: Tensor) -> Tensor:
        """What a vector [..., H] added behind the norm adds to linear logits: [..., N]."""
        weight, _ = self._kept_rows or self._own_rows()
        return F.linear(vectors.to(weight.dtype), weight) * self._scale

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
