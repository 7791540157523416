"""A loss that is computed part by part, each part's gradient at once, as one autograd function.

So memory does not grow with the number of parts, and a training loop sees one loss and one backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Gradients:
    """Sums of gradients with respect to fixed inputs, which may be leaves with hooks of others."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.sums: dict[int, Tensor] = {}

    def add(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for tensor, gradient in zip(inputs, gradients, strict=True):
            if gradient is None:
                continue
            if id(tensor) in self.sums:
                self.sums[id(tensor)] += gradient
            else:
                self.sums[id(tensor)] = gradient

    def complete(self, inputs: Sequence[Tensor]) -> None:
        """Give those a gradient of 0 that have none: other processes wait for every one."""
        for tensor in inputs:
            if id(tensor) not in self.sums:
                self.sums[id(tensor)] = torch.zeros_like(tensor)

    def backward(self, outputs: Tensor, gradient: Tensor) -> None:
        """Add what `outputs` pass back. Unlike `Tensor.backward`, no hook of a parameter fires."""
        found = torch.autograd.grad(outputs, self.inputs, gradient, allow_unused=True)
        self.add(self.inputs, found)

    def in_order(self) -> list[Tensor | None]:
        return [self.sums.get(id(tensor)) for tensor in self.inputs]


class Accumulated(torch.autograd.Function):
    """A loss whose gradients are computed together with it and kept until they are asked for.

    Args:
        run: inputs -> loss, a tensor to report, and the gradients of the inputs.
        inputs: the first `activations` of them are cut off from their graph inside, the others are
            parameters.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, activations: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[:activations]]
        gradients = Gradients([*leaves, *inputs[activations:]])
        with torch.enable_grad():
            loss, report = run(leaves, gradients)
        ctx.gradients = gradients.in_order()
        loss, report = loss.detach(), report.detach()
        ctx.mark_non_differentiable(report)
        return loss, report

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # a second pass would find them scaled
        return None, None, *(g if g is None else g.mul_(scale) for g in gradients)


Run = Callable[[list[Tensor], Gradients], tuple[Tensor, Tensor]]
