"""Keep the hooked states of a target as they were handed out.

vLLM's models hand out the state before their first layer as it is, without a copy. The layers then
add to it in place: on a GPU the norms that add a residual write the sum over it, unless Inductor
compiles them. The head would be given the state of some later layer. Some models hand out later
states the same way. So a layer whose input is handed out gets a copy of it to work on.

This is done to the modules of one loaded target, whatever class it is of and however it collects
its states.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("specformer::copied", mutates_args=())
def copied(x: Tensor) -> Tensor:
    """A copy of `x` that no compiler pass takes for superfluous.

    Inductor and vLLM's passes drop a plain `clone` whose source is not written to in the same piece
    of the graph; the write may be in another.
    """
    return x.clone()


@copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep_hooked_states(decoder: nn.Module, hooks: Iterable[int], num_layers: int) -> None:
    """Let the layers that the hooked states go into work on copies; before the first forward pass.

    Args:
        decoder: the target's decoder, with all its layers in one list.
        hooks: in vLLM's numbering: state i is the input of layer i, counted from 0.
        num_layers: the decoder's.

    Raises:
        ValueError: state 0 is hooked and the list of layers cannot be found.
    """
    lists = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers)
    layers = next(lists, None)
    if layers is None:
        if 0 in hooks:
            raise ValueError(
                f"{type(decoder).__name__} has no list of {num_layers} layers, so its hidden state "
                "0 cannot be kept from being overwritten; train a head with --hooks from 1 on, or "
                "serve this target without speculation"
            )
        return
    for hook in hooks:
        if hook < num_layers:
            copy = _copy_all if hook == 0 else _copy_if_alone
            layers[hook].register_forward_pre_hook(copy, with_kwargs=True)


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2


def _copy_all(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Copies of every [T, H] among the first layer's arguments."""
    args = tuple(copied(a) if _is_state(a) else a for a in args)
    return args, {name: copied(a) if _is_state(a) else a for name, a in kwargs.items()}


def _copy_if_alone(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same, unless the layer is given two of one width: then their sum is handed out."""
    # Not whole shapes: to compare numbers of tokens would fix them when the target is compiled.
    widths = [a.shape[-1] for a in (*args, *kwargs.values()) if _is_state(a)]
    return _copy_all(layer, args, kwargs) if len(widths) == len(set(widths)) else None
