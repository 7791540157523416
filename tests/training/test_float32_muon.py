"""Muon in float32 is PyTorch's Muon, but for the rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_specformer.training.float32_muon import Float32Muon, orthogonalised

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(8, 8), (6, 11), (11, 6), (5, 40), (40, 5)]


def by_singular_values(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The polynomial of each step on the singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_iteration(shape: tuple[int, int], steps: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    got = orthogonalised(matrix, COEFFICIENTS, steps, 1e-7)
    torch.testing.assert_close(
        got.double(), by_singular_values(matrix, steps), rtol=1e-4, atol=1e-5
    )


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalised(torch.zeros(3, 9), COEFFICIENTS, 5, 1e-7).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_those_of_pytorch(shape: tuple[int, int]) -> None:
    """Momentum, decay and rate are the same; an update differs by bfloat16's rounding alone."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    optimizers = [Float32Muon([ours], **options), torch.optim.Muon([theirs], **options)]
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03)
    states = [optimizer.state_dict()["state"][0] for optimizer in optimizers]
    torch.testing.assert_close(states[0], states[1])
    moved = float((ours - 1).detach().abs().mean())
    assert moved > 0.06


def test_a_parameter_without_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    Float32Muon([parameter], lr=1.0).step()
    assert torch.equal(parameter.data, torch.ones(2, 3))
