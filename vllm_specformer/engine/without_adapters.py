"""The target's logits as they are without LoRA adapters.

vLLM's LoRA wrapper of the logits adds each request's adapter by a table that it lays out for the
rows of the verification, K+1 per request. The draft pass has other rows: with that table it would
stop on a CPU, and on a GPU read and write behind the ends of its tensors.
"""

from __future__ import annotations

from copy import copy
from typing import Any

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
