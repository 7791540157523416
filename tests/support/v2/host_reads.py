"""Counts what makes the host wait for a GPU, or what no CUDA graph can hold, on a CPU.

There every tensor is the host's, so waiting cannot be observed; what asks for it can: operators and
methods whose result the host has to know, tensors made from the host's data or without saying on
which device, and explicit synchronisation.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Methods of a tensor that make the host wait for its values and that dispatch no operator on a CPU.
READING_METHODS = ("tolist", "numpy", "cpu", "__array__", "pin_memory")
READING_OPERATORS = {
    "_local_scalar_dense",  # item(), int(), float(), bool(), an index or a slice bound
    "nonzero",
    "argwhere",
    "masked_select",
    "equal",
    "is_nonzero",
    # Their output has as many entries as the values say.
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "multinomial",  # checks its weights on the host
    "lift_fresh",  # a tensor of Python numbers, to be copied to the device
}
# Of the module torch: on the host unless told otherwise, and copied to the device later. Not among
# them is `empty`, with which vLLM's matrix products for a CPU make room for their results.
FACTORIES = ("arange", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")
HOST_DATA = ("as_tensor", "from_numpy", "frombuffer", "tensor")
WAITING = ((torch.cuda, "synchronize"), (torch.accelerator, "synchronize"))


class HostReads(TorchDispatchMode):
    """Counts between `counting` and its end; `patch` must have been called before."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators = 0
        self._paused = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        name = func.overloadpacket.__name__
        if name in READING_OPERATORS:
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.found["boolean index"] += 1
        # Its output has as many rows as the values say, unless the caller gave the number.
        if func is torch.ops.aten.repeat_interleave.Tensor and not (kwargs or {}).get(
            "output_size"
        ):
            self.found["repeat_interleave"] += 1
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        self._paused = False
        try:
            with self:
                yield
        finally:
            self._paused = True

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """For the interpreter, which reads a kernel's tensors as no compiled kernel would."""
        was, self._paused = self._paused, True
        try:
            with _disable_current_modes():
                yield
        finally:
            self._paused = was

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch what dispatches no operator, too."""

        def always(*_: Any, **__: Any) -> bool:
            return True

        def without_device(*_: Any, **kwargs: Any) -> bool:
            return kwargs.get("device") is None

        for name in READING_METHODS:
            self._watch(monkeypatch, Tensor, name, always)
        # By name; a tensor's own device, which is a CPU's here as well, is an object.
        self._watch(monkeypatch, Tensor, "to", lambda *args, **_: "cpu" in map(str_only, args))
        for name in FACTORIES:
            self._watch(monkeypatch, torch, name, without_device)
        for name in HOST_DATA:
            self._watch(monkeypatch, torch, name, always)
        for module, name in WAITING:
            # There is no device to wait for, so nothing is called.
            self._watch(monkeypatch, module, name, always, lambda *_, **__: None)

    def _watch(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        is_read: Callable[..., bool],
        instead: Callable[..., Any] | None = None,
    ) -> None:
        original = instead or getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._paused and is_read(*args, **kwargs):
                self.found[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)


def str_only(argument: Any) -> str:
    return argument if isinstance(argument, str) else ""
