"""The target's logits for the tokens of a draft vocabulary alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

logger = init_logger(__name__)

Logits = Callable[[Tensor], Tensor]

_TRIAL_ROWS = 8
# Products of 16-bit numbers that are summed in another order differ less; a scale, a cap or a bias
# that one of the two ways leaves out moves logits by more.
_SAME = 0.02


def logits_of_some(
    language: Any, embedding: Any, full: Logits, token_ids: Tensor, like: Tensor
) -> Logits:
    """A function from normed states [R, H] to the target's logits [R, N] of `token_ids`.

    Most targets' logits are vLLM's `LogitsProcessor` over an `lm_head`. Where that is a plain
    matrix over the whole vocabulary, the same processor runs over a copy of the N rows, made once:
    scale and cap stay the target's, the product costs N/V of the full one. Whether it gives what
    the target gives is tried out. Otherwise (tensor parallelism, a quantised lm_head, a projection
    of the target's own) the full logits are computed and N of them kept.

    If a server replaces its target's weights, the copy is the old one: that costs acceptance.

    Args:
        language: the target, or the language model in it.
        embedding: its embedding table, which is the lm_head of some.
        full: normed states -> logits [R, V].
        token_ids: int64 [N], on the target's device.
        like: any tensor [..., H] with the states' type and device.
    """
    some = _over_copied_rows(language, getattr(language, "lm_head", embedding), token_ids)
    if some is not None and _agree(some, full, token_ids, like):
        return some
    logger.info("draft vocabulary: this target's lm_head is not a plain matrix; using it whole")
    return lambda states: full(states).index_select(-1, token_ids)


class CopiedRows(nn.Module):
    """The target's logits processor over rows of its lm_head: states [R, H] -> logits [R, N]."""

    def __init__(self, processor: LogitsProcessor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        method = UnquantizedEmbeddingMethod()
        rows = SimpleNamespace(weight=weight, bias=bias, tp_size=1, quant_method=method)
        method.process_weights_after_loading(rows)
        # Not registered: the processor is the target's.
        self._logits = lambda states: processor(rows, states, rows.bias)
        self.register_buffer("weight", rows.weight, persistent=False)
        self.register_buffer("bias", rows.bias, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self._logits(states)
        return logits


def _over_copied_rows(language: Any, lm_head: Any, token_ids: Tensor) -> CopiedRows | None:
    """The target's logits processor over some rows of its lm_head, if that is a plain matrix."""
    processor = getattr(language, "logits_processor", None)
    method = getattr(lm_head, "quant_method", None)
    plain = isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
    if not isinstance(processor, LogitsProcessor) or not plain or lm_head.tp_size > 1:
        return None
    weight, bias = lm_head.weight, getattr(lm_head, "bias", None)
    if weight.ndim != 2 or int(token_ids[-1]) >= len(weight):  # packed, or given away
        return None
    return CopiedRows(
        processor, weight.data[token_ids], None if bias is None else bias.data[token_ids]
    )


@torch.no_grad()
def _agree(some: Logits, full: Logits, token_ids: Tensor, like: Tensor) -> bool:
    """Whether both ways give the same logits for random states."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_TRIAL_ROWS, like.shape[-1], generator=generator).to(like)
    expected = full(states).index_select(-1, token_ids).float()
    error = (some(states).float() - expected).norm()
    return bool(error <= _SAME * expected.norm())


# What vLLM wraps when it loads a target with --enable-lora and computes logits with.
_WRAPPED = ("logits_processor", "lm_head")


def without_adapters(language: Any) -> Any:
    """A language model that computes its logits with the weights of `language` and no adapter.

    Parameters are shared. `language` itself if vLLM has wrapped nothing that makes logits.
    """
    bare = {
        name: getattr(language, name).base_layer
        for name in _WRAPPED
        if hasattr(getattr(language, name, None), "base_layer")
    }
    if not bare:
        return language
    plain = copy(language)
    plain._modules = language._modules | bare
    return plain
