"""Where a decoder keeps its layers and its final norm, in Transformers and in vLLM alike."""

from __future__ import annotations

from typing import Any

LAYER_NAMES = ("layers", "h")
NORM_NAMES = ("norm", "norm_f", "final_layernorm", "final_layer_norm", "ln_f")


def find_part(owner: Any, names: tuple[str, ...]) -> Any:
    """The first attribute of `owner` among `names`.

    Raises:
        AttributeError: it has none; the message lists them.
    """
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise AttributeError(f"{type(owner).__name__} has none of: {', '.join(names)}")
