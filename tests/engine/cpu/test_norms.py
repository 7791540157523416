"""The head's norms on a CPU against what the head computes by itself."""

from __future__ import annotations

import copy

import pytest
import torch

from support.paths import HEAD
from vllm_specformer.engine.cpu.norms import HookNorm, use_for
from vllm_specformer.head import SpecFormerHead, grouped_rms_norm
from vllm_specformer.head_layers import RMSNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def head() -> SpecFormerHead:
    head: SpecFormerHead = SpecFormerHead.from_pretrained(HEAD, dtype=torch.float32)
    return head.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_hooked_states(head: SpecFormerHead, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    head = head.to(dtype)
    hooks, size = head.hook_norm_weight.shape
    joined = (3 * torch.randn(rows, hooks * size)).to(dtype)
    views = joined.unflatten(-1, (hooks, size)).unbind(-2)  # as the runner's rows come
    before = joined.clone()
    found = head.fc(HookNorm(head)(views))
    exact = head.double()
    eps = exact.config.rms_norm_eps
    normed = grouped_rms_norm([view.double() for view in views], exact.hook_norm_weight, eps)
    expected = exact.fc(normed)
    # Every product of a sum may be off by its own rounding: 0.65 of this in 150 draws of float32.
    bound = torch.finfo(dtype).eps * (normed.abs() @ exact.fc.weight.abs().T)
    assert torch.equal(joined, before)
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_norm_of_the_head(head: SpecFormerHead, dtype: torch.dtype) -> None:
    head = head.to(dtype)
    torch.manual_seed(0)
    own = copy.deepcopy(head)
    use_for(own)
    columns = (3 * torch.randn(2, head.config.hidden_size, 5)).to(dtype)
    states = columns.transpose(1, 2)  # not contiguous
    norms = [name for name, module in head.named_modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 5
    for name in norms:
        expected = head.get_submodule(name).double()(states.double())
        found = own.get_submodule(name)(states).double()
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
