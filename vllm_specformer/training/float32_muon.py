"""Muon in float32, for processors that have no arithmetic in bfloat16.

PyTorch's `Muon` always iterates in bfloat16. Where the processor only emulates it, that takes ten
times as long as the rest of a training step (57 s against 5 s, 13M parameters, an AVX2 core).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# From this ratio of sides on, iterating on the Gram matrix takes fewer multiplications.
_OBLONG = 2


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """The loss that an optimiser's step is given to compute, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` of the same states with its iteration in float32, original rates only."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(average, momentum) if group["nesterov"] else average
        steps, eps = group["ns_steps"], group["eps"]
        update = orthogonalised(direction, group["ns_coefficients"], steps, eps)
        rate = float(group["lr"])
        parameter.mul_(1 - rate * group["weight_decay"])
        rows, columns = parameter.shape
        parameter.add_(update, alpha=-rate * math.sqrt(max(1, rows / columns)))


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Newton and Schulz's iteration: about `U V'` of the matrix `U S V'`, in float32.

    Source: Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024). Each step is
    X <- (a + b G + c G^2) X with G = X X'. So G alone tells all factors, and an oblong X need only
    be multiplied at the end, by their product.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).float()
    x = x / x.norm().clamp(min=eps)
    small, large = x.shape
    if large < _OBLONG * small:
        for _ in range(steps):
            x = _factor(x @ x.T, coefficients) @ x
    else:
        x = _product(x @ x.T, coefficients, steps) @ x
    return x.T if tall else x


def _product(gram: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The product of all factors; they commute, as all are polynomials of the first Gram matrix."""
    product = factor = _factor(gram, coefficients)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram, coefficients)
        product = factor @ product
    return product


def _factor(gram: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """a + b G + c G^2."""
    a, b, c = coefficients
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor
